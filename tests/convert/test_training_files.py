"""Training files of the method's authors on top of a stock model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import ppcl_rt

sys.path.insert(0, str(Path(__file__).parent))
import authors_format as authors

DEPTH, TOLERANCE = 9, 5e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    authors.stock(DEPTH, 0).save_pretrained(folder)
    return folder


def listed(entries, prefix=""):
    return {f"{prefix}{n}.{name}": tensor for n, entry in enumerate(entries) for name, tensor in entry.items()}


def students(count):
    return [dict(authors.stock(1, 50 + n).transformer_blocks[0].state_dict()) for n in range(count)]


def loop_of(states, kinds_layers):
    """The packaged state by hand: blocks' stock states, and what each gets beside them."""
    outer = {n: t for n, t in authors.stock(DEPTH, 0).state_dict().items() if not n.startswith("transformer_blocks.")}
    for n, (state, layers) in enumerate(zip(states, kinds_layers, strict=True)):
        held = dict(state)
        if "img_ffn_proj" in layers:
            held |= {name: tensor[: 3 * authors.DIM] for name, tensor in held.items() if "_mod." in name}
        held |= {k: v for name, layer in layers.items() for k, v in authors.under(name, layer).items()}
        outer |= {f"transformer_blocks.{n}.{name}": tensor for name, tensor in held.items()}
    return authors.Loop(outer)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_depth(base, tmp_path, ppcl, build_inputs, run, same, prefix):
    made = students(2)
    torch.save(listed(made, prefix), tmp_path / "depth.bin")
    status, _, error = ppcl(
        "import", tmp_path / "depth.bin", tmp_path / "out", "--base", base, "--intervals", "1-2,5-7"
    )
    assert status == 0, error
    stock = [dict(block.state_dict()) for block in authors.stock(DEPTH, 0).transformer_blocks]
    wanted = loop_of([stock[0], made[0], stock[3], stock[4], made[1], stock[8]], [{}] * 6)
    model, given = ppcl_rt.load(tmp_path / "out"), build_inputs()
    same(run(model, given), run(wanted, given), TOLERANCE)
    # Blocks keep their numbers.
    assert [b.interval.key for b in model.plan.blocks] == ["0-0", "1-2", "3-3", "4-4", "5-7", "8-8"]


@pytest.mark.parametrize("ehs", ["published", "intended"])
@pytest.mark.parametrize("runs", ["3-5,6-8", "1-4,5-7"], ids=["kept numbers", "numbered anew"])
def test_width(base, tmp_path, ppcl, build_inputs, run, same, ehs, runs):
    made = students(1)
    # Blocks that remain: 0, the student of 1..2, 3 and so on; with 1-4 the run begins at the student.
    pruned = [4, 5, 7, 8] if runs == "3-5,6-8" else [3, 4, 6, 7]
    inputs = [authors.affine(n) for n in range(4)]
    maps = [authors.affine(20 + n) for n in range(8)]
    exits = [authors.affine(40 + n) for n in range(2)]
    torch.save(
        {
            "transformer_distill_blocks": listed(made),
            "attn_proj_list": listed(inputs),
            "ffn_proj_list": listed(maps, "module."),
            "ehs_proj_list": listed(exits),
            "block_proj_list": listed([authors.affine(1), authors.affine(2)]),
        },
        tmp_path / "width.bin",
    )
    arguments = ("import", tmp_path / "width.bin", tmp_path / "out", "--base", base, "--intervals", "1-2")
    status, _, error = ppcl(*arguments, "--text-runs", runs)
    assert status == 2 and "say --ehs published" in error
    status, said, error = ppcl(*arguments, "--text-runs", runs, "--ehs", ehs)
    assert status == 0, error
    assert ("numbered anew" in said) == (runs == "1-4,5-7")
    stock = [dict(block.state_dict()) for block in authors.stock(DEPTH, 0).transformer_blocks]
    states, layers = [], []
    for n in (0, 1, *range(3, DEPTH)):
        state, own = made[0] if n == 1 else stock[n], {}
        if n in pruned:
            k = pruned.index(n)
            state = {name: t for name, t in state.items() if not name.startswith(("txt_m", "img_mlp"))}
            own = {"txt_proj": inputs[k], "img_ffn_proj": maps[2 * k + 1]}
            if k % 2:
                own["ehs_proj"] = exits[0 if ehs == "published" else k // 2]
        states.append(state)
        layers.append(own)
    model, given = ppcl_rt.load(tmp_path / "out"), build_inputs()
    same(run(model, given), run(loop_of(states, layers), given), TOLERANCE)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_bad_files(base, tmp_path, ppcl):
    file, out = tmp_path / "x.bin", tmp_path / "out"

    def refused(content, *more, says):
        torch.save(content, file)
        status, said, error = ppcl("import", file, out, "--base", base, *more)
        assert status == 2 and said == "" and len(error.splitlines()) == 1 and says in error, error
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    two = listed(students(2))
    given = ("--intervals", "1-2,5-7")
    refused({**two, "0.x": Malicious(tmp_path / "executed")}, *given, says="holds other things than tensors")
    assert not (tmp_path / "executed").exists()
    refused(two, says="say --base STOCK and --intervals")
    refused(two, "--intervals", "1-2", says="transformer_distill_blocks has 2 entries, wanted 1: 1 intervals")
    refused(two, "--intervals", "1-2,2-4", says="intervals 1..2 and 2..4 overlap")
    refused(two, "--intervals", "1-2,7-9", says="interval 7..9 reaches beyond block 8")
    refused(two, "--intervals", "1-2,x", says="--intervals takes FIRST-LAST")
    refused(two, *given, "--text-runs", "3-4", says="attn_proj_list has 0 entries, wanted 1")
    refused(two, *given, "--text-runs", "5-7", says="no block after 5 is left")
    refused({n: t for n, t in two.items() if n != "1.img_mod.1.bias"}, *given, says="student 1, of blocks 5..7, lacks")
    refused({n: t for n, t in two.items() if n[0] == "1"}, *given, says="has no entry 0")
    refused({"other": two}, *given, says="holds other; files of a width run hold")
    refused({"x": torch.zeros(1)}, *given, says="holds x, wanted tensors k.NAME")
    refused([1], *given, says="holds no state dict")
    wrong = {"transformer_distill_blocks": two, "attn_proj_list": {"0.weight": torch.zeros(3, 3)}}
    refused(wrong, *given, "--text-runs", "3-4", says="entry 0 is no layer from 32 to 32 channels")
    file.write_bytes(b"no file of torch's")
    status, _, error = ppcl("import", file, out, "--base", base, *given)
    assert status == 2 and len(error.splitlines()) == 1, error
