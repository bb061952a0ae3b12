"""Every command takes its source from a folder or from the hub; one of another family is refused in one line."""

from __future__ import annotations

import pickle
import shutil

import huggingface_hub
import pytest
import tiny_flux
import torch
from diffusers import UNet2DModel
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import ppcl_rt
from ppcl_rt.checkpoint import places
from ppcl_rt.checkpoint.card import CARD, Origin, read_origin
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data.teacher_file import find_pretrained
from ppcl_train.stages import teacher

FRONT = "---\nlicense: apache-2.0\nbase_model: a/b\n---\n"


@pytest.fixture(scope="module")
def repositories(build_stock, tmp_path_factory):
    """Folders by hub id: a transformer, a pipeline, one of single files, and models of other kinds."""
    root = tmp_path_factory.mktemp("hub")
    stock = build_stock(3)
    stock.save_pretrained(root / "org" / "model")
    stock.save_pretrained(root / "org" / "pipeline" / "transformer")
    (root / "org" / "pipeline" / "model_index.json").write_text("{}")
    files = root / "org" / "files"
    files.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in stock.state_dict().items()}
    save_file(tensors, files / "tune.safetensors")
    layer, rank = "transformer.transformer_blocks.0.attn.to_q", 2
    dim = stock.transformer_blocks[0].attn.to_q.weight.shape[0]
    adds = {f"{layer}.lora_A.weight": torch.ones(rank, dim), f"{layer}.lora_B.weight": torch.ones(dim, rank)}
    (files / "loras").mkdir()
    save_file(adds, files / "loras" / "style.safetensors")
    for name in ("model", "pipeline", "files"):
        (root / "org" / name / CARD).write_text(FRONT)
    UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_pretrained(root / "org" / "unet")
    tiny_flux.build_stock().save_pretrained(root / "org" / "flux")
    return root, stock


@pytest.fixture
def hub(repositories, monkeypatch, tmp_path_factory):
    """The hub of `repositories` in place of the real one; returns the names of files that were fetched."""
    root, fetched, cache = repositories[0], [], tmp_path_factory.mktemp("cache")

    def fetch(repository, allow_patterns=None, **_):
        if not (source := root / repository).is_dir() or ".." in repository:
            raise LocalEntryNotFoundError(repository)
        names = (str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            fetched.append(f"{repository}/{name}")
            (cache / repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, cache / repository / name)
        return str(cache / repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return fetched


def written(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("source", ["org/model", "org/pipeline", "org/files/tune.safetensors"])
def test_convert_takes_the_hubs(repositories, hub, ppcl, tmp_path, source):
    """Folders, pipelines and files; settings and adapters too. The licence is that of the card there."""
    config = ("--config", "org/pipeline") if source.endswith(".safetensors") else ()
    status, _, err = ppcl(
        *("convert", source, tmp_path / "out", *config, "--fuse", "org/files/loras/style.safetensors:0.5")
    )
    assert status == 0, err
    found, wanted = written(tmp_path / "out"), repositories[1].state_dict()
    added = "transformer_blocks.0.attn.to_q.weight"
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor + (1 if name == added else 0), atol=1e-6, rtol=1e-6)
    assert read_origin(tmp_path / "out") == Origin("a/b", "apache-2.0")
    if config:
        # The weights of the model with the same settings stay where they are.
        assert not any("pipeline" in name and name.endswith(".safetensors") for name in hub)


def test_other_commands_take_the_hubs(hub, ppcl, tmp_path, build_inputs, run, repositories, same):
    given = build_inputs(1)
    wanted = run(repositories[1], given)
    assert ppcl("slim", "org/model", tmp_path / "slim")[0] == 0
    assert ppcl("slim", "org/pipeline", tmp_path / "slim of a pipeline", "--subfolder", "transformer")[0] == 0
    one, other = (ppcl_rt.Checkpoint(tmp_path / name) for name in ("slim", "slim of a pipeline"))
    assert one.names == other.names and one.catalog.license == other.catalog.license == "apache-2.0"
    assert ppcl("export", "org/model", tmp_path / "one.safetensors", "--format", "single-file")[0] == 0
    assert find_pretrained("org/pipeline") == places.locate_transformer("org/pipeline")
    same(run(ppcl_rt.load("org/model"), given), wanted)
    same(run(ppcl_rt.load("org/pipeline", subfolder="transformer"), given), wanted)


def test_a_pipeline_where_a_transformer_is_wanted(repositories, hub, ppcl, tmp_path):
    for source in ("org/pipeline", repositories[0] / "org" / "pipeline"):
        for command in ("slim", "export"):
            status, _, err = ppcl(command, source, tmp_path / "out")
            assert status == 2 and err.count("\n") == 1 and "name its subfolder transformer" in err, err
    assert not list(tmp_path.iterdir())


# Of a model that no family here has, by every door.
UNKNOWN = {
    "convert": ("convert", "org/unet", "{out}"),
    "its settings": ("convert", "org/files/tune.safetensors", "{out}", "--config", "org/unet"),
    "slim": ("slim", "org/unet", "{out}"),
    "export": ("export", "org/unet", "{out}", "--ratio", "1"),
    "import": ("import", "org/unet", "{out}"),
    "plan": ("plan", "org/unet"),
    "sample": ("sample", "org/unet", "--prompt", "x", "--out", "{out}"),
}


@pytest.mark.parametrize("arguments", UNKNOWN.values(), ids=UNKNOWN)
def test_a_hub_id_of_another_family(hub, ppcl, tmp_path, arguments):
    status, _, err = ppcl(*(argument.format(out=tmp_path / "out") for argument in arguments))
    assert status == 2 and err.count("\n") == 1 and "UNet2DModel; the families here are" in err, err
    assert not list(tmp_path.iterdir())


def test_the_settings_of_another_family(hub, ppcl, tmp_path):
    """One that is known here, but not the one of the file; and a folder that is not in the authors' layout."""
    said = ppcl("convert", "org/files/tune.safetensors", tmp_path / "out", "--config", "org/flux")
    assert said[0] == 2 and said[2].count("\n") == 1 and "is no FluxTransformer2DModel" in said[2]
    said = ppcl("import", "org/flux", tmp_path / "out")
    assert said[0] == 2 and said[2].count("\n") == 1 and "no layout of the authors' is known" in said[2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pretrained", "said"), [("org/flux", "the task qwen-image trains a Qwen"), ("org/unet", "families here")]
)
def test_a_teacher_of_another_family(hub, tmp_path, pretrained, said):
    with pytest.raises(ValueError, match=said) as refused:
        teacher.train(with_changes(PRESETS["qwen-image"], {"teacher.pretrained": pretrained}), tmp_path)
    assert "\n" not in str(refused.value) and not (tmp_path / teacher.OUTPUT).exists()


def test_a_folder_is_no_teacher_file_of_a_pretrained_one(repositories, tmp_path):
    """A preset with a pretrained teacher takes the folder by its setting."""
    config = with_changes(PRESETS["qwen-image"], {"teacher.pretrained": "org/model"})
    with pytest.raises(ValueError, match=r"leave out --teacher; teacher\.pretrained takes a folder"):
        pipeline.begin(config, tmp_path / "run", repositories[0] / "org" / "model")
    assert not list(tmp_path.iterdir())


MISSING = ["org/none", "org/files/none.safetensors", "none.gguf", "../org/model"]


@pytest.mark.parametrize("source", MISSING)
def test_what_is_nowhere(hub, ppcl, tmp_path, source):
    for arguments in (
        (source, tmp_path / "out"),
        ("org/model", tmp_path / "out", "--config", source),
        ("org/model", tmp_path / "out", "--fuse", source),
    ):
        status, _, err = ppcl("convert", *arguments)
        assert status == 2 and err.count("\n") == 1 and "can be reached" in err, err
    assert not list(tmp_path.iterdir())


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_ever_run(repositories, ppcl, tmp_path):
    stock = repositories[0] / "org" / "model"
    for name in ("x.ckpt", "x.gguf"):
        (tmp_path / name).write_bytes(pickle.dumps(Harmful(tmp_path / "harm"), protocol=2))
    for name in ("x.bin", "x.safetensors"):
        torch.save({"0.x": Harmful(tmp_path / "harm")}, tmp_path / name)
    files = sorted(tmp_path.iterdir())
    for file in files:
        doors = [("convert", file, tmp_path / "out"), ("convert", stock, tmp_path / "out", "--fuse", file)]
        doors += [("import", file, tmp_path / "out", "--base", stock, "--intervals", "0-1")]
        for arguments in doors:
            status, _, err = ppcl(*arguments)
            assert status == 2 and err.count("\n") == 1 and str(file) in err, err
    assert sorted(tmp_path.iterdir()) == files
