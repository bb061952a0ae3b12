"""Width in closed form, and recovery's plans."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppcl_rt import Architecture, BlockList, Catalog, Interval, LegalWidths, Planner, Student, Tokens
from ppcl_rt.convert.low_rank import Inputs, LowRank
from ppcl_rt.families.qwen_image import block_spec
from ppcl_train.closed_form.block_statistics import BlockStatistics
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.closed_form.surgery import eliminate
from ppcl_train.closed_form.text_runs import fit_text_runs, later_blocks
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.config.stages import EndToEndConfig
from ppcl_train.data import calibration, streams
from ppcl_train.data.passes import Passes
from ppcl_train.stages import teacher
from ppcl_train.stages.assembly import legal_counts
from ppcl_train.stages.recover import Plans, random_plan
from ppcl_train.stages.width import compress_block, modulation_inputs

RUN = with_changes(
    PRESETS["scenes"],
    {
        "teacher.architecture": {**PRESETS["scenes"].teacher.architecture, "num_layers": 3, "num_attention_heads": 2},
        "width.ranks": [6, 3],
        "batch": 64,
    },
)


def gram_of(x, weight=None):
    fit = LeastSquares(x.shape[1])
    # In float64: some ridges here are smaller than what rounding to float32 leaves of a dependent input.
    fit.add(x.double(), weight=weight)
    return fit.gram


def columns_of(order, count, e):
    return (order[:count, None] * e + torch.arange(e)).flatten()


def test_elimination_is_least_squares_on_what_remains():
    """At every count weight and bias are the regression of the full output on the kept inputs; two inputs a unit."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 5), torch.randn(500, 12) @ torch.randn(12, 12) + 1
    order, (found,) = eliminate([(layer, gram_of(x))], 6, [4, 2], ridge=1e-9)
    assert sorted(order.tolist()) == list(range(6)) and set(found) == {4, 2}
    for count, (weight, bias) in found.items():
        kept = torch.cat([x[:, columns_of(order, count, 2)], torch.ones(500, 1)], 1).double()
        wanted = torch.linalg.lstsq(kept, layer(x).double()).solution
        # Double precision throughout; the ridge of 1e-9 and a condition of some 1e3 leave 1e-6.
        assert torch.allclose(weight, wanted[:-1].T, atol=1e-6) and torch.allclose(bias, wanted[-1], atol=1e-6)


def test_elimination_takes_out_what_costs_least():
    """The first unit to go is the one whose removal, compensated, loses least: against trying all of them."""
    torch.manual_seed(1)
    layer, x = nn.Linear(6, 4), torch.randn(400, 6) @ torch.randn(6, 6)
    order, _ = eliminate([(layer, gram_of(x))], 6, [5], ridge=1e-12)
    centred, y = (x - x.mean(0)).double(), (layer(x) - layer(x).mean(0)).double()
    losses = []
    for unit in range(6):
        kept = centred[:, [n for n in range(6) if n != unit]]
        losses.append((y - kept @ torch.linalg.lstsq(kept, y).solution).square().sum())
    assert order[-1] == int(torch.stack(losses).argmin())


def test_inputs_that_the_others_determine_cost_nothing():
    generator = torch.Generator().manual_seed(3)
    free, layer = torch.randn(300, 4, generator=generator), nn.Linear(7, 5)
    # Three of seven inputs are linear in the others and offset, one of them constant.
    copies = free @ torch.randn(4, 2, generator=generator) + torch.tensor([0.0, 2.0])
    x = torch.cat([free, copies, torch.full((300, 1), 3.0)], dim=1)
    order, (found,) = eliminate([(layer, gram_of(x))], 7, [4], ridge=1e-12)
    weight, bias = found[4]
    assert order[-1] == 6 or 6 in order[4:].tolist()
    assert torch.allclose(F.linear(x[:, order[:4]].double(), weight, bias).float(), layer(x), atol=1e-3)


def test_layers_that_share_units_are_weighed_by_their_own_output():
    """A layer whose output is a thousand times larger does not decide alone."""
    torch.manual_seed(2)
    x = torch.randn(500, 2)
    small, large = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        small.weight.copy_(torch.tensor([[0.001, 0.0]]))
        large.weight.copy_(torch.tensor([[0.4, 1.0]]))
    small.bias = large.bias = nn.Parameter(torch.zeros(1))
    # Unit 1 is all but a seventh of the large layer, unit 0 all of the small one.
    order, _ = eliminate([(small, gram_of(x)), (large, gram_of(x))], 2, [1], ridge=1e-9)
    assert order[0] == 0


def test_weights_of_rows_count_as_copies():
    torch.manual_seed(4)
    x, y = torch.randn(50, 3), torch.randn(50, 2)
    times = torch.arange(50) % 3
    once, copied = LeastSquares(3, 2), LeastSquares(3, 2)
    once.add(x, y, times.float())
    copied.add(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
    for a, b in zip(once.solve(0.0), copied.solve(0.0), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_factors_are_the_best_map_of_their_rank_and_nested():
    """Eckart-Young: no map of rank r loses less on these inputs; rank 2 is a prefix of rank 4."""
    torch.manual_seed(5)
    layers, x = [nn.Linear(6, 5), nn.Linear(6, 7)], torch.randn(300, 6) @ torch.randn(6, 6) * 0.3 + 2
    affine = [(layer.weight.detach(), layer.bias.detach()) for layer in layers]
    (down, down_bias), ups = LowRank(affine, Inputs.of(x)).factors(4)
    up, up_bias = (torch.cat(each) for each in zip(*ups, strict=True))
    wanted = torch.cat([layer(x) for layer in layers], 1).double().detach()
    spectrum = torch.linalg.svdvals(wanted - wanted.mean(0))
    for rank in (1, 2, 4):
        got = (x.double() @ down[:rank].T + down_bias[:rank]) @ up[:, :rank].T + up_bias
        assert (got - wanted).square().sum() == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def rough():
    """A teacher whose every parameter is far from where it starts."""
    model = teacher.initial(RUN).eval().requires_grad_(False)
    torch.manual_seed(6)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_block_in_closed_form(rough):
    """What the closed forms of a block are made from: its own inputs, words alone of the text, and its MLPs' share."""
    block = rough.blocks()[1]
    statistics = BlockStatistics(block)
    batches = [calibration.inputs(RUN, 64, n) for n in range(3)]
    for batch in batches:
        passed = streams.trace(rough, batch)
        statistics.add(passed.streams[1], batch, passed.context)
    assert statistics.inputs["txt_mlp.net.2"].gram[-1, -1] == sum(int(batch.mask.sum()) for batch in batches)
    made = compress_block(RUN, statistics, modulation_inputs(RUN, rough)[rough.catalog.architecture.kind(1)])
    counts = legal_counts(RUN, block.spec)
    assert counts == {"heads": [2, 1], "image": [128, 96, 64, 48, 32, 16, 0], "text": [128, 96, 64, 48, 32, 16, 0],
                      "modulation": [32, 6, 3]}  # fmt: skip
    assert made["replacements.modulation_down.weight"].shape == (6, 32)
    # The map predicts what the MLP adds better than nothing does, and better than its mean does.
    batch = calibration.inputs(RUN, 64, 9)
    passed = streams.trace(rough, batch)
    handle = block.img_mlp.net[2].register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    g = streams.run_block(block, passed.streams[1], passed.context).image
    handle.remove()
    added = passed.streams[2].image - g
    mapped = F.linear(g, made["replacements.mlp_image_0.weight"], made["replacements.mlp_image_0.bias"])
    error = (mapped - added).square().mean()
    assert error < 0.8 * (added - added.mean((0, 1))).square().mean()


def test_text_runs_are_regressions_on_the_teachers_own_streams(rough):
    """What a block of a run reads, from what the first read; and the text behind a run, from that behind its first."""
    run = with_changes(
        RUN, {"width.longest_text_run": 3, "width.samples": 192, "width.ridge": 1e-9, "compress.share": 0.0}
    )
    made = fit_text_runs(run, Passes(run, rough, 192), later_blocks(rough, 3))
    # Each map once from the first block; the last block of the model has no text to move on to.
    assert {name.rsplit(".", 1)[0] for name in made} == {
        *("text_runs.0.z_1", "text_runs.0.z_2", "text_runs.0.text_1", "text_runs.1.z_2"),
    }
    reads, texts = ([[] for _ in range(4)] for _ in range(2))
    for batch in calibration.batches(run, 192, calibration.WIDTH):
        passed = streams.trace(rough, batch)
        for n, state in enumerate(passed.streams):
            texts[n].append(state.text[batch.mask])
            if n < 3:
                seen = rough.transformer_blocks[n].text_input(
                    state.text, passed.context["temb"], rough.blocks()[n].spec.full
                )
                reads[n].append(seen[batch.mask])
    reads, texts = ([torch.cat(each).double() if each else None for each in both] for both in (reads, texts))
    for name, x, y in (
        ("text_runs.0.z_2", reads[0], reads[2]),
        ("text_runs.0.z_1", reads[0], reads[1]),
        ("text_runs.0.text_1", texts[1], texts[2]),
    ):
        rows = torch.cat([x, torch.ones(len(x), 1)], 1).double()
        wanted = rows @ torch.linalg.lstsq(rows, y - x).solution
        got = x @ made[f"{name}.weight"].double().T + made[f"{name}.bias"].double()
        # The fit, not its coefficients: 32 inputs from some 600 words are far from orthogonal.
        assert (got - wanted).square().mean() < 1e-6 * (y - x).square().mean(), name


def catalog_of(depth=12):
    widths = LegalWidths(
        {
            "heads": ((6, 0), (3, 0.1)),
            "image": ((384, 0), (0, 0.2)),
            "text": ((384, 0), (96, 0.01)),
            "modulation": ((96, 0), (8, 1e-4)),
        }
    )
    intervals = [Interval(u, u + n - 1) for n in (2, 3) for u in range(depth + 1 - n)]
    rng = np.random.default_rng(0)
    students = [Student(interval=i, start="first", loss=float(rng.uniform(0.1, 1)), widths=widths) for i in intervals]
    architecture = Architecture(
        lists=(BlockList(path="transformer_blocks", kind="two-stream", depth=depth),),
        kinds={"two-stream": block_spec(dim=96, heads=6, head_dim=16)},
        dim=96,
        outer_params=1000,
    )
    return Catalog(
        family="qwen-image",
        reference=Tokens(16, 7),
        architecture=architecture,
        blocks=(widths,) * depth,
        students=tuple(students),
        compensated=True,
    )


def test_random_plans_are_plans():
    catalog = catalog_of()
    plans = [catalog.check(random_plan(catalog, random.Random(seed))) for seed in range(100)]
    lengths = {len(plan.blocks) for plan in plans}
    assert not any(plan.skipped for plan in plans)
    # From half the blocks to all of them.
    assert min(lengths) <= 6 and max(lengths) >= 11


def test_drawn_plans_hold_the_smallest_and_the_dense_one_only_if_asked():
    catalog = catalog_of(4)
    plans = Plans(catalog, Planner(catalog).plans(0.02), EndToEndConfig(planned=0.7))
    drawn = [plans.draw(random.Random(n), dense=False) for n in range(200)]
    assert catalog.dense not in drawn and len(set(drawn)) > 20
    least = min(catalog.architecture.params(plan) for plan in drawn)
    # 15 %, and some of the planned and random ones.
    assert sum(catalog.architecture.params(plan) == least for plan in drawn) >= 20
    assert sum(plans.draw(random.Random(n), dense=True) == catalog.dense for n in range(200)) >= 30
