"""Checkpoints of the method's authors: in, run, and out again; the reference is a loop written from the format."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

import ppcl_rt
from ppcl_rt.convert.authors import import_packaged, write_authors
from ppcl_train.data.teacher_file import find_pretrained

sys.path.insert(0, str(Path(__file__).parent))
import authors_format as authors

# Sixteen blocks: outputs of size 1, and sums in another order in each; what the issue asks for.
TOLERANCE = 5e-5


@pytest.mark.parametrize(
    ("older", "mask"),
    [
        (False, "none"),
        (True, "random"),
        pytest.param(False, "random", marks=pytest.mark.slow),
        pytest.param(True, "none", marks=pytest.mark.slow),
    ],
)
def test_it_gives_what_the_loop_gives(tmp_path, build_inputs, run, same, ppcl, older, mask):
    state = authors.make(tmp_path / "in", older=older, files=3)
    status, said, error = ppcl("import", tmp_path / "in", tmp_path / "out")
    assert status == 0, error
    assert "2 x ehs_proj of a full block" in said and f"the {'older' if older else 'newer'} dialect" in said
    given, loop = build_inputs(mask=mask), authors.Loop(state, older)
    wanted = run(loop, given)
    imported = ppcl_rt.load(tmp_path / "out")
    same(run(imported, given), wanted, TOLERANCE)
    # Directly: the same weights, without writing them.
    direct = ppcl_rt.load(tmp_path / "in")
    assert torch.equal(run(direct, given), run(imported, given))
    assert direct.plan.text_runs == imported.plan.text_runs
    assert [run.key for run in direct.plan.text_runs] == ["0-4", "6-9", "11-12", "13-15"]
    # Nobody reads the text after the last block.
    assert "text" not in direct.text_runs["13-15"] and "text" in direct.text_runs["0-4"]
    residuals = [torch.randn(3, 15, authors.DIM, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    wanted = run(loop, given, controlnet_block_samples=residuals)
    same(run(direct, given, controlnet_block_samples=residuals), wanted, TOLERANCE)


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 6))])
def test_random_combinations(tmp_path, build_inputs, run, same, seed):
    rng = np.random.default_rng(seed)
    kinds = ("f" + "m" * int(rng.integers(2)), *(
        "".join([str(rng.choice(["f", "p"])), "m" * int(rng.integers(2)), "e" * int(rng.integers(2))])
        for _ in range(int(rng.integers(1, 7)))
    ))  # fmt: skip
    older, dtype = bool(rng.integers(2)), (torch.float32, torch.bfloat16)[seed % 2]
    state = authors.make(tmp_path / "in", kinds, older=older, seed=seed, dtype=dtype)
    given = build_inputs(seed)
    import_packaged(tmp_path / "in", tmp_path / "out")
    wanted = run(authors.Loop(state, older), given)
    for folder in ("in", "out"):
        model = ppcl_rt.load(tmp_path / folder, dtype=torch.float32)
        same(run(model, given), wanted, TOLERANCE)
        assert next(ppcl_rt.load(tmp_path / folder).parameters()).dtype == dtype


def test_masked_tokens_count_for_nothing(tmp_path, build_inputs, run, same):
    """The authors' code ignores the mask; ours gives what theirs would give without the padding."""
    state = authors.make(tmp_path / "in")
    model, given = ppcl_rt.load(tmp_path / "in"), build_inputs(batch=1, mask="none")
    whole = run(authors.Loop(state, use_mask=False), given)
    padding = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
    padded = {
        **given,
        "encoder_hidden_states": torch.cat([given["encoder_hidden_states"], padding], 1),
        "encoder_hidden_states_mask": torch.arange(10)[None] < 7,
    }
    same(run(model, padded), whole, TOLERANCE)
    assert (run(authors.Loop(state, use_mask=False), padded) - whole).abs().max() > 1e-3


def test_in_the_pipeline_with_guidance(tmp_path, parts):
    state = authors.make(tmp_path / "in")

    def draw(transformer, kind):
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = QwenImagePipeline(**{**parts, "scheduler": scheduler}, transformer=transformer)
        pipe.set_progress_bar_config(disable=True)
        options = {"true_cfg_scale": 3.0, "height": 32, "width": 48, "num_inference_steps": 2, "output_type": kind}
        seeded = torch.Generator().manual_seed(0)
        return np.asarray(pipe("two red squares", negative_prompt="blur", generator=seeded, **options).images)

    class InPipeline(QwenImageTransformer2DModel):
        """The loop, where the pipeline checks for the stock class."""

        def forward(self, *args, **kwargs):
            return loop(*args, **kwargs)

    loop = authors.Loop(state)
    theirs, ours = InPipeline(**authors.CONFIG, num_layers=1), ppcl_rt.load(tmp_path / "in")
    for kind in ("latent", "np"):
        wanted = draw(theirs, kind)
        assert wanted.std() > 1e-2
        np.testing.assert_allclose(draw(ours, kind), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("older", [False, True], ids=["newer", "older"])
def test_out_and_in_again(tmp_path, build_inputs, run, older):
    authors.make(tmp_path / "in", older=older)
    import_packaged(tmp_path / "in", tmp_path / "first")
    model = ppcl_rt.load(tmp_path / "first")
    write_authors(model, tmp_path / "authors")
    import_packaged(tmp_path / "authors", tmp_path / "second")
    first, second = (ppcl_rt.Checkpoint(tmp_path / name) for name in ("first", "second"))
    assert set(first.names) == set(second.names)
    for name in first.names:
        assert torch.equal(first.read(name), second.read(name)), name
    given = build_inputs()
    assert torch.equal(run(model, given), run(ppcl_rt.load(tmp_path / "authors"), given))
    kinds = [kind.replace("fe", "f").replace("fme", "fm") for kind in authors.EVERY_KIND]
    written = json.loads((tmp_path / "authors" / "config.json").read_text())
    assert written["single_stream_index"] == [n for n, kind in enumerate(kinds) if "p" in kind]
    assert written["ffn_proj_index"] == [n for n, kind in enumerate(kinds) if "m" in kind]
    # Of 0..4 the two are one map, and so are those of 6..9; none where nobody reads the text.
    assert written["ehs_proj_index"] == [4, 9]


def test_students_go_out_as_full_blocks(tmp_path, make_checkpoint, build_inputs, run, same):
    made = make_checkpoint(tmp_path / "in", text_runs=[(2, 3)])
    full = dict(made.catalog.spec(0).full)
    student = ppcl_rt.PlannedBlock(interval=ppcl_rt.Interval(0, 1), width=ppcl_rt.Width(full), student=True)
    kept = [(n, ppcl_rt.Width(full)) for n in (2, 3)]
    plan = made.catalog.compose(kept, [student], [ppcl_rt.Interval(2, 3)])
    model = ppcl_rt.load(made.folder, plan=plan)
    write_authors(model, tmp_path / "out")
    again, given = ppcl_rt.load(tmp_path / "out"), build_inputs()
    # Heads and channels are in stock order there: sums in another order.
    same(run(again, given), run(model, given))
    assert [str(run) for run in again.plan.text_runs] == ["1..2"]


def test_what_the_layout_cannot_hold(tmp_path, made, mapped):
    model = ppcl_rt.load(made.folder, 0.6)
    with pytest.raises(ValueError, match=r"run \d+ of \d+ \w+ units, and the authors' layout holds whole blocks"):
        write_authors(model, tmp_path / "out")
    full = mapped.catalog.spec(0).full
    blocks = [(n, full.replace(image=0) if n == 1 else full) for n in range(4)]
    model = ppcl_rt.load(mapped.folder, plan=mapped.catalog.compose(blocks))
    with pytest.raises(ValueError, match=r"blocks 1\.\.1 run a linear map for the image MLP alone"):
        write_authors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


KINDS = ("f", "p", "pe", "f")


def refused(ppcl, tmp_path, *arguments, says):
    status, out, error = ppcl("import", *arguments)
    assert status == 2 and out == "" and len(error.splitlines()) == 1
    assert says in error, error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_dialects_by_evidence(ppcl, tmp_path, build_inputs, run, same):
    state = authors.make(tmp_path / "older", KINDS, older=True, config={"ffn_proj_index": [], "ehs_proj_index": [2]})
    refused(ppcl, tmp_path, tmp_path / "older", tmp_path / "out", says="say which by --dialect")
    with pytest.raises(ValueError, match=r"config\.json is of the newer dialect, but txt_proj of block 1"):
        ppcl_rt.load(tmp_path / "older")
    status, _, error = ppcl("import", tmp_path / "older", tmp_path / "made", "--dialect", "older")
    assert status == 0, error
    given = build_inputs()
    same(run(ppcl_rt.load(tmp_path / "made"), given), run(authors.Loop(state, True), given), TOLERANCE)
    authors.make(tmp_path / "newer", KINDS, config={"ffn_proj_index": None, "ehs_proj_index": None})
    refused(ppcl, tmp_path, tmp_path / "newer", tmp_path / "out", says="of the older dialect, but")
    authors.make(tmp_path / "half", KINDS, config={"ffn_proj_index": None})
    refused(ppcl, tmp_path, tmp_path / "half", tmp_path / "out", says="has ehs_proj_index alone")
    config = json.loads((tmp_path / "newer" / "config.json").read_text())
    state = authors.make(tmp_path / "mixed", KINDS)
    state["transformer_blocks.2.txt_proj.weight"] += torch.eye(authors.DIM)
    authors.write(tmp_path / "mixed", config, state)
    refused(ppcl, tmp_path, tmp_path / "mixed", tmp_path / "out", says="mixes dialects")
    state["transformer_blocks.2.txt_proj.weight"] -= torch.eye(authors.DIM) / 2
    authors.write(tmp_path / "mixed", config, state)
    refused(ppcl, tmp_path, tmp_path / "mixed", tmp_path / "out", says="near neither 0 (newer) nor 1 (older)")


def test_broken_folders(ppcl, tmp_path, made, build_stock):
    out = tmp_path / "out"

    def spoilt(says, kinds=KINDS, drop="nothing", config=None, **put):
        folder = tmp_path / "spoilt"
        state = authors.make(folder, kinds, config=config)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(drop)}
        authors.write(folder, json.loads((folder / "config.json").read_text()), state | put)
        refused(ppcl, tmp_path, folder, out, says=says)
        with pytest.raises(ValueError):
            ppcl_rt.load(folder)

    spoilt("lacks block 3, config.json says num_layers 4", drop="transformer_blocks.3.")
    spoilt("holds block 3, config.json says num_layers 3", config={"num_layers": 3})
    spoilt("block 1 lacks attn.to_add_out.bias", drop="transformer_blocks.1.attn.to_add_out.bias")
    spoilt("block 0 reads the text of a full block before it", kinds=("p", "f"))
    spoilt("single_stream_index is [1], the tensors say [1, 2]", config={"single_stream_index": [1]})
    spoilt("ffn_proj_index is x", config={"ffn_proj_index": "x"})
    spoilt("holds ehs.weight, which", **{"transformer_blocks.1.ehs.weight": torch.zeros(1)})
    spoilt("holds no proj_out.weight", drop="proj_out.weight")
    spoilt("img_mod.1.weight is [5, 32], wanted", **{"transformer_blocks.0.img_mod.1.weight": torch.zeros(5, 32)})
    spoilt("no layout of the authors' is known for PPCLFlux", config={"_class_name": "FluxTransformer2DModel"})
    spoilt("is a NobodysModel; the families here are", config={"_class_name": "NobodysModel"})
    build_stock().save_pretrained(tmp_path / "stock")
    refused(ppcl, tmp_path, tmp_path / "stock", out, says="is a stock checkpoint")
    refused(ppcl, tmp_path, made.folder, out, says="is a pluggable checkpoint already")
    refused(ppcl, tmp_path, tmp_path / "stock", out, "--dialect", "new", says="--dialect is newer or older, not new")
    refused(ppcl, tmp_path, tmp_path / "stock", out, "--ehs", "published", says="--ehs goes with a .bin")
    authors.make(tmp_path / "whole", KINDS)
    refused(ppcl, tmp_path, tmp_path / "whole", tmp_path / "whole", says="write to another folder")


def test_a_packaged_folder_is_no_stock_model_to_anybody(ppcl, tmp_path):
    authors.make(tmp_path / "in", KINDS, config=dict.fromkeys(("single_stream_index", "ffn_proj_index"), None))
    with pytest.raises(ValueError, match="has ehs_proj_index alone"):
        ppcl_rt.PPCLQwenImageTransformer2DModel.from_pretrained(tmp_path / "in")
    authors.make(tmp_path / "in", KINDS)
    status, out, error = ppcl("plan", tmp_path / "in", "--ratio", 1)
    assert status == 0 and "text not updated" in out, error
    with pytest.raises(ValueError, match="a teacher is a stock transformer"):
        find_pretrained(str(tmp_path / "in"))
    status, _, error = ppcl("convert", tmp_path / "in", tmp_path / "out")
    assert status == 2 and error.count("\n") == 1 and "`ppcl import` reads it" in error
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
