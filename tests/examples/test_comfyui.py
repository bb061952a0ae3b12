"""The nodes of ComfyUI, loaded and run as ComfyUI does it, next to stand-ins for the three modules that they import.

ComfyUI itself is not installed. What is repeated here, it does: a file of ``custom_nodes`` is loaded by its path and
entered into ``sys.modules`` under it without its suffix; nodes run in inference mode, in a task of asyncio; a node's
object and its results are kept as long as its inputs are the same.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ppcl_rt.pipelines.words import WordTable

ROOT = Path(__file__).parents[2]
SCENES = str(ROOT / "examples/scenes")
FILE = "ppcl_nodes.py"
LOAD, SAMPLE = "PPCLLoadPipeline", "PPCLSampleAtRatio"
WIDGETS = {"STRING": str, "INT": int, "FLOAT": float}
SCENE = {"prompt": "two red squares", "steps": 2}
WORDS = {"prompt": "red cup", "steps": 2, "width": 48, "height": 32}


class Interrupted(Exception):
    """What ComfyUI raises when somebody presses stop."""


class ProgressBar:
    made: list[ProgressBar] = []

    def __init__(self, total, node_id=None):
        self.total, self.said = total, []
        self.made.append(self)

    def update_absolute(self, value, total=None, preview=None):
        self.total = self.total if total is None else total
        self.said.append(min(value, self.total))


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """The stand-ins; ``stop_after`` is the number of steps after which somebody presses stop."""
    comfy, management, utils, folders = map(
        ModuleType, ("comfy", "comfy.model_management", "comfy.utils", "folder_paths")
    )
    comfy.stop_after, comfy.home = None, tmp_path_factory.mktemp("models") / "diffusers"
    comfy.home.mkdir()

    def throw_exception_if_processing_interrupted():
        if comfy.stop_after is not None and len(ProgressBar.made[-1].said) >= comfy.stop_after:
            raise Interrupted

    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    management.get_torch_device = lambda: torch.device("cpu")
    utils.ProgressBar = ProgressBar
    folders.get_folder_paths = lambda name: {"diffusers": [str(comfy.home)]}[name]
    comfy.model_management, comfy.utils = management, utils
    with pytest.MonkeyPatch.context() as patch:
        for module in (comfy, management, utils, folders):
            patch.setitem(sys.modules, module.__name__, module)
        yield comfy


@pytest.fixture(scope="module")
def nodes(comfy, tmp_path_factory):
    """The mappings of the file, copied alone into an empty ``custom_nodes``."""
    path = tmp_path_factory.mktemp("custom_nodes") / FILE
    shutil.copyfile(ROOT / "examples/comfyui" / FILE, path)
    name = str(path.with_suffix(""))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys() == {LOAD, SAMPLE}
        yield module.NODE_CLASS_MAPPINGS


def defaults(kind):
    """What a node that was just put down has in its widgets; links are left out."""
    given = kind.INPUT_TYPES()
    found = {}
    for name, (type_, *more) in [*given["required"].items(), *given.get("optional", {}).items()]:
        if isinstance(type_, list):
            found[name] = more[0]["default"] if more else type_[0]
        elif type_ in WIDGETS:
            found[name] = more[0]["default"]
    return found


def call(kind, **inputs):
    """Run a node on its widgets, but for some."""

    async def run():
        with torch.inference_mode():
            return getattr(kind(), kind.FUNCTION)(**{**defaults(kind), **inputs})

    returned = asyncio.run(run())
    assert isinstance(returned, tuple) and len(returned) == len(kind.RETURN_TYPES)
    return returned[0]


@pytest.fixture(scope="module")
def scenes(nodes):
    return call(nodes[LOAD], folder=SCENES)


@pytest.fixture(scope="module")
def pipeline_folder(parts, make_checkpoint, comfy):
    """A pipeline with a table of words and a pluggable transformer, tiny and random, in ComfyUI's models/diffusers."""
    from diffusers import QwenImagePipeline

    folder = comfy.home / "tiny"
    QwenImagePipeline(parts["scheduler"], parts["vae"], None, None, None).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "QwenImageTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    WordTable.random(["red", "cup", "blue"], 16).write(folder)
    make_checkpoint(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def tiny(nodes, pipeline_folder):
    """That pipeline, loaded by its name."""
    return call(nodes[LOAD], folder=pipeline_folder.name)


def is_image(image, count, height, width):
    return (
        image.shape == (count, height, width, 3)
        and image.dtype == torch.float32
        and image.device.type == "cpu"
        and 0 <= image.min() <= image.max() <= 1
    )


def test_inputs_are_those_of_the_functions(nodes):
    for kind in nodes.values():
        given = kind.INPUT_TYPES()
        required, optional = given["required"], given.get("optional", {})
        parameters = dict(inspect.signature(getattr(kind, kind.FUNCTION)).parameters)
        del parameters["self"]
        assert {*required, *optional} == parameters.keys()
        assert all(parameters[name].default is not parameters[name].empty for name in optional)
        assert kind.CATEGORY and kind.RETURN_TYPES and len(kind.RETURN_NAMES) == len(kind.RETURN_TYPES)
        for name, value in defaults(kind).items():
            type_, options = (required | optional)[name]
            if isinstance(type_, list):
                assert value in type_
            else:
                assert isinstance(value, WIDGETS[type_]), name
                assert options.get("min", value) <= value <= options.get("max", value)
    loaded, drawn = nodes[LOAD], nodes[SAMPLE]
    assert drawn.INPUT_TYPES()["required"]["pipeline"] == loaded.RETURN_TYPES
    assert drawn.RETURN_TYPES == ("IMAGE",)
    options = drawn.INPUT_TYPES()["required"]["ratio"][1]
    assert (options["min"], options["max"], options["display"]) == (0.05, 1.0, "slider")


def test_scenes_at_several_ratios(nodes, scenes):
    """What was loaded stays, and another ratio is another picture of the same seed."""
    held = scenes.model.resident_bytes
    half = call(nodes[SAMPLE], pipeline=scenes, ratio=0.5, seed=3, **SCENE)
    assert is_image(half, 1, 16, 16) and held < scenes.model.resident_bytes
    fifth = call(nodes[SAMPLE], pipeline=scenes, ratio=0.2, seed=3, **SCENE)
    assert not torch.equal(half, fifth)
    assert torch.equal(call(nodes[SAMPLE], pipeline=scenes, ratio=0.5, seed=3, **SCENE), half)
    two = call(nodes[SAMPLE], pipeline=scenes, ratio=0.5, seed=2**64 - 1, count=2, **SCENE)
    assert is_image(two, 2, 16, 16) and not torch.equal(two[0], two[1])


def test_every_step_is_told_and_stop_stops(nodes, scenes, comfy, monkeypatch):
    call(nodes[SAMPLE], pipeline=scenes, **{**SCENE, "steps": 3})
    bar = ProgressBar.made[-1]
    assert (bar.said, bar.total) == ([1, 2, 3], 3)
    monkeypatch.setattr(comfy, "stop_after", 2)
    with pytest.raises(Interrupted):
        call(nodes[SAMPLE], pipeline=scenes, ratio=0.2, **{**SCENE, "steps": 3})
    assert ProgressBar.made[-1].said == [1, 2]
    # Nothing of the stopped run is left: what is set is the plan that was loaded.
    assert scenes.model.catalog.ratio(scenes.model.plan) == pytest.approx(scenes.model.planner.smallest)


def test_a_pipeline_at_two_ratios(nodes, tiny):
    dense = call(nodes[SAMPLE], pipeline=tiny, ratio=1.0, **WORDS)
    half = call(nodes[SAMPLE], pipeline=tiny, ratio=0.5, **WORDS)
    assert is_image(dense, 1, 32, 48) and is_image(half, 1, 32, 48) and not torch.equal(dense, half)
    assert torch.equal(call(nodes[SAMPLE], pipeline=tiny, ratio=1.0, **WORDS), dense)
    # The largest seed of ComfyUI's.
    assert not torch.equal(call(nodes[SAMPLE], pipeline=tiny, ratio=1.0, seed=2**64 - 1, **WORDS), dense)
    assert (ProgressBar.made[-1].said, ProgressBar.made[-1].total) == ([1, 2], 2)


def test_what_a_prompt_leaves_out_is_said(nodes, tiny, caplog):
    call(nodes[SAMPLE], pipeline=tiny, **{**WORDS, "prompt": "red zebra"})
    assert "left out: zebra" in caplog.text


def test_a_negative_prompt_is_of_one_run(nodes, tiny):
    plain = call(nodes[SAMPLE], pipeline=tiny, guidance=4.0, **WORDS)
    negative = tiny.task.negative
    assert not torch.equal(call(nodes[SAMPLE], pipeline=tiny, guidance=4.0, negative="blue", **WORDS), plain)
    assert tiny.task.negative == negative
    assert torch.equal(call(nodes[SAMPLE], pipeline=tiny, guidance=4.0, **WORDS), plain)


def test_two_samplings_at_once(nodes, tiny):
    """Two ratios in two threads give what each gives alone."""
    ratios = (1.0, 0.5)
    alone = [call(nodes[SAMPLE], pipeline=tiny, ratio=ratio, **WORDS) for ratio in ratios]
    begin = threading.Barrier(2)

    def draw(ratio):
        begin.wait(timeout=60)
        return call(nodes[SAMPLE], pipeline=tiny, ratio=ratio, **WORDS)

    with ThreadPoolExecutor(2) as pool:
        for one, other in zip(alone, pool.map(draw, ratios), strict=True):
            assert torch.equal(one, other)


def test_another_transformer_for_a_pipeline(nodes, pipeline_folder, tiny, made):
    """A checkpoint in the place of the pipeline's own, by its path."""
    other = call(nodes[LOAD], folder=str(pipeline_folder), transformer=str(made.folder))
    assert other.model.catalog == made.catalog
    assert torch.equal(call(nodes[SAMPLE], pipeline=other, **WORDS), call(nodes[SAMPLE], pipeline=tiny, **WORDS)), (
        "both are the tiny checkpoint of the same seed"
    )


def test_a_stock_pipeline_runs_at_ratio_one(nodes, qwen_folder):
    """With a text encoder, and a transformer that is not pluggable."""
    stock = call(nodes[LOAD], folder=str(qwen_folder))
    assert is_image(call(nodes[SAMPLE], pipeline=stock, ratio=1.0, **WORDS), 1, 32, 48)
    with pytest.raises(ValueError, match=r"ratio 0\.5 is below the smallest plan"):
        call(nodes[SAMPLE], pipeline=stock, ratio=0.5, **WORDS)


def test_other_weights(nodes, scenes):
    half = call(nodes[LOAD], folder=SCENES, dtype="bfloat16", device="cpu")
    assert half.model.dtype == torch.bfloat16 and half.model.resident_bytes < scenes.model.resident_bytes
    eight = call(nodes[LOAD], folder=SCENES, quantize="int8")
    assert eight.model.dtype == torch.float32
    assert is_image(call(nodes[SAMPLE], pipeline=eight, ratio=0.35, **SCENE), 1, 16, 16)


def test_what_cannot_be_is_one_line(nodes, scenes, tiny, tmp_path):
    load, sample = nodes[LOAD], nodes[SAMPLE]
    assert load.VALIDATE_INPUTS(folder=SCENES) is True and load.VALIDATE_INPUTS(folder=None) is True
    for folder in ("", "nowhere"):
        said = load.VALIDATE_INPUTS(folder=folder)
        assert said == f'there is no folder "{folder}": give a path, or one of the folders in models/diffusers (tiny)'
        with pytest.raises(ValueError) as refused:
            call(load, folder=folder)
        assert str(refused.value) == said
    with pytest.raises(ValueError, match=r"^.* is no checkpoint: it has no config.json$"):
        call(load, folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"^.* is no folder of a pipeline that could draw with .*$"):
        call(load, folder=SCENES, transformer=SCENES)
    for inputs, wanted in (
        ({"ratio": 0.05}, "ratio 0.05 is below the smallest plan"),
        ({"prompt": "a cat"}, 'the word "cat" means nothing here'),
        ({"negative": "blue"}, "takes no negative prompt"),
        ({"width": 32, "height": 32}, "scenes are 16x16 pixels, not 32x32"),
        ({"width": 32}, "give width and height, or 0 for both: not 32 and 0"),
    ):
        with pytest.raises(ValueError, match=wanted) as refused:
            call(sample, pipeline=scenes, **{**SCENE, **inputs})
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="a prompt is empty"):
        call(sample, pipeline=tiny, **{**WORDS, "prompt": " "})


def test_a_checkpoint_that_was_written_anew_is_loaded_anew(nodes, pipeline_folder):
    changed, given = nodes[LOAD].IS_CHANGED, defaults(nodes[LOAD])
    before = changed(**{**given, "folder": "tiny"})
    assert before == changed(**{**given, "folder": "tiny"})
    config = pipeline_folder / "transformer/config.json"
    text = config.read_bytes()
    config.unlink()
    config.write_bytes(text)
    assert changed(**{**given, "folder": "tiny"}) != before
    # A link's text is not known before it runs.
    assert changed(**{**given, "folder": None}) == ""
