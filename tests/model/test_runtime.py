"""Switching at run time: who sees which plan, what lies in memory, and what is read for it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch

import ppcl_rt
from ppcl_rt import Checkpoint, Interval, PlannedBlock, Schedule, Width, ops
from ppcl_rt.ops.packing import side_by_side

FULL = Width(heads=4, image=128, text=128, modulation=32)
RATIOS = (0.6, 0.7, 0.75, 0.95, 1.0)


@pytest.fixture
def model(made):
    """The plain checkpoint, all of it resident, at ratio 1."""
    return ppcl_rt.load(made.folder, resident="all")


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that were read, in order."""
    names: list[str] = []
    read = Checkpoint.read

    def recorded(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", recorded)
    return names


@pytest.fixture(scope="module")
def at_ratio(made, build_inputs, run):
    """What the model gives at each ratio, from a fresh load; no two alike."""
    outputs = {ratio: run(ppcl_rt.load(made.folder, ratio), build_inputs()) for ratio in RATIOS}
    assert len({output.sum().item() for output in outputs.values()}) == len(RATIOS)
    return outputs


def test_is_a_drop_in(model):
    """A subclass of diffusers' class, in eval mode, without a parameter on meta or a NaN."""
    from diffusers import QwenImageTransformer2DModel

    assert isinstance(model, QwenImageTransformer2DModel) and not model.training
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu" and torch.isfinite(parameter).all(), name


def test_set_ratio(made, model, build_inputs, run, same, at_ratio):
    """`set_ratio` runs what a load at that ratio runs, within the budget, in any order."""
    for ratio in (*RATIOS, *RATIOS[::-1]):
        model.set_ratio(ratio)
        assert model.plan == model.planner.plan(ratio) and made.catalog.ratio(model.plan) <= ratio
        same(run(model, build_inputs()), at_ratio[ratio])


def test_second_visit_neither_plans_nor_reads(made, reads, monkeypatch):
    """The second visit of a ratio is a look-up, also where weights were read for the first."""
    model = ppcl_rt.load(made.folder, 0.6)
    model.set_ratio(0.95)
    reads.clear()
    monkeypatch.setattr("ppcl_rt.planning.planner.milp", lambda *_, **__: pytest.fail("planned again"))
    for ratio in (0.6, 0.95, 0.6):
        model.set_ratio(ratio)
        with model.at(ratio=0.95):
            pass
    assert not reads


def test_set_plan(made, model, build_inputs, run, same):
    """`set_plan` runs just that plan until the next is set; one that cannot run changes nothing."""
    plan = made.plan(PlannedBlock(interval=Interval(1, 1), width=Width(heads=2, image=33, text=65, modulation=32)))
    model.set_plan(plan)
    assert model.plan == plan
    for bad in (
        plan.model_copy(update={"checkpoint": "0" * 16}),
        plan.model_copy(update={"depth": 5}),
        made.plan(PlannedBlock(interval=Interval(2, 3), width=FULL, student=True)),
        made.plan(PlannedBlock(interval=Interval(1, 1), width=Width(heads=5, image=1, text=1, modulation=32))),
        made.plan(PlannedBlock(interval=Interval(1, 1), width=Width(heads=1, image=129, text=1, modulation=32))),
    ):
        with pytest.raises(ValueError) as caught:
            model.set_plan(bad)
        assert "\n" not in str(caught.value)
    assert model.plan == plan
    same(run(model, build_inputs()), run(made.reference(plan), build_inputs()))


def test_at(made, model, build_inputs, run, same, at_ratio):
    """`at` holds inside its ``with`` alone, nests, and lets go when something fails."""
    inputs = build_inputs()
    model.set_ratio(0.95)
    plan = made.random_plan(np.random.default_rng(0))
    with model.at(ratio=0.7) as same_model:
        assert same_model is model
        same(run(model, inputs), at_ratio[0.7])
        with model.at(plan=plan):
            assert model.plan == plan
            same(run(model, inputs), run(made.reference(plan), inputs))
            # What is set inside becomes the default, and is seen outside.
            model.set_ratio(0.75)
            assert model.plan == plan
        same(run(model, inputs), at_ratio[0.7])
        with pytest.raises(RuntimeError, match="stop"), model.at(ratio=1.0):
            raise RuntimeError("stop")
        same(run(model, inputs), at_ratio[0.7])
    same(run(model, inputs), at_ratio[0.75])


def test_at_wants_one_choice(model):
    """A ratio or a plan, not both and not neither; a bad one leaves the model as it was."""
    for arguments in ({}, {"ratio": 0.5, "plan": model.plan}, {"ratio": 2.0}, {"ratio": 1e-6}):
        with pytest.raises(ValueError), model.at(**arguments):
            pass
    assert model.plan == model.catalog.dense


def test_at_is_of_one_model(made, model):
    """`at` on one model says nothing to another of the same checkpoint."""
    other = copy.deepcopy(model)
    with model.at(ratio=0.6):
        assert other.plan == made.catalog.dense != model.plan
        with other.at(ratio=0.75):
            assert model.plan == model.planner.plan(0.6) and other.plan == model.planner.plan(0.75)


@pytest.mark.parametrize("resident", ["all", "plan"])
def test_threads(made, build_inputs, run, same, at_ratio, resident):
    """Two threads at once, at ratios of their own, each get their own result, also while weights are being read."""
    model, inputs = ppcl_rt.load(made.folder, 0.6, resident=resident), build_inputs()
    start, failures = threading.Barrier(3), []

    def work(ratios):
        try:
            start.wait(timeout=30)
            for ratio in ratios * 8:
                with model.at(ratio=ratio):
                    same(run(model, inputs), at_ratio[ratio])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(ratios,)) for ratios in ((0.7, 1.0), (0.95, 0.75))]
    for thread in threads:
        thread.start()
    start.wait(timeout=30)
    for _ in range(8):
        same(run(model, inputs), at_ratio[0.6])
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert model.plan == model.planner.plan(0.6)
    same(run(model, inputs), at_ratio[0.6])


# Schedules.


def denoise(model, inputs, run, timesteps, calls=2):
    """The outputs of a pipeline's calls: ``calls`` at each timestep."""
    return [
        [run(model, {**inputs, "timestep": torch.full((3,), timestep)}) for _ in range(calls)] for timestep in timesteps
    ]


@pytest.mark.parametrize("calls", [1, 2])
def test_schedule_counts_steps(made, model, build_inputs, run, same, calls):
    """`Schedule.warm`: dense for two timesteps, however often each is called, and again when the timestep rises."""
    model.set_schedule(Schedule.warm(dense_steps=2, ratio=0.6))
    small = made.reference(model.planner.plan(0.6))
    inputs, timesteps = build_inputs(), (1.0, 0.75, 0.5, 0.25)
    assert model.plan == made.catalog.dense
    for _ in range(2):
        outputs = denoise(model, inputs, run, timesteps, calls)
        assert model.plan == model.planner.plan(0.6)
        for n, (timestep, group) in enumerate(zip(timesteps, outputs, strict=True)):
            reference = made.stock if n < 2 else small
            for output in group:
                same(output, run(reference, {**inputs, "timestep": torch.full((3,), timestep)}))


def test_schedule_of_plans(made, build_inputs, run, same, reads):
    """What a schedule names is resident once it is set, and nothing is read while it runs."""
    model = ppcl_rt.load(made.folder, 0.6)
    plan = made.random_plan(np.random.default_rng(5))
    model.set_schedule(Schedule(phases=((0, plan), (1, 1.0), (2, 0.75))))
    reads.clear()
    inputs, timesteps = build_inputs(), (0.95, 0.6, 0.3)
    outputs = denoise(model, inputs, run, timesteps)
    assert not reads
    for timestep, group, now in zip(
        timesteps, outputs, (plan, made.catalog.dense, model.planner.plan(0.75)), strict=True
    ):
        for output in group:
            same(output, run(made.reference(now), {**inputs, "timestep": torch.full((3,), timestep)}))


def test_schedule_is_left(made, model, build_inputs, run, same, at_ratio):
    """`at` goes before a schedule, without moving its clock; `set_ratio` ends it; a bad one is refused whole."""
    inputs = build_inputs()
    model.set_schedule(Schedule.warm(dense_steps=1, ratio=0.6))
    with model.at(ratio=0.75):
        same(run(model, inputs), at_ratio[0.75])
        run(model, {**inputs, "timestep": inputs["timestep"] / 2})
    same(run(model, inputs), at_ratio[1.0])
    with pytest.raises(ValueError):
        model.set_schedule(Schedule(phases=((0, 0.6), (1, made.catalog.dense.model_copy(update={"checkpoint": "x"})))))
    assert model.plan == made.catalog.dense
    model.set_ratio(0.7)
    for timestep in (1.0, 0.5, 0.2):
        run(model, {**inputs, "timestep": torch.full((3,), timestep)})
        assert model.plan == model.planner.plan(0.7)


def test_schedule_per_thread(made, model, build_inputs, run, same):
    """Two runs at once keep their own count of steps."""
    model.set_schedule(Schedule.warm(dense_steps=1, ratio=0.6))
    inputs, got = build_inputs(), []
    first = denoise(model, inputs, run, (1.0, 0.5))
    thread = threading.Thread(target=lambda: got.extend(denoise(model, inputs, run, (0.4,))))
    thread.start()
    thread.join()
    at = {**inputs, "timestep": torch.full((3,), 0.4)}
    same(got[0][0], run(made.stock, at))
    assert (got[0][0] - run(made.reference(model.planner.plan(0.6)), at)).abs().max() > 1e-3
    same(first[1][0], run(made.reference(model.planner.plan(0.6)), {**inputs, "timestep": torch.full((3,), 0.5)}))


# Memory and reading.


def test_resident_bytes(made):
    """A smaller plan takes less memory: what its parameters come to, no more."""
    small, whole = ppcl_rt.load(made.folder, 0.6), ppcl_rt.load(made.folder, 1.0)
    assert whole.resident_bytes == 4 * made.catalog.architecture.dense_params
    assert small.resident_bytes == 4 * made.catalog.architecture.params(small.plan) <= 0.6 * whole.resident_bytes
    everything = ppcl_rt.load(made.folder, 0.6, resident="all")
    assert everything.resident_bytes > whole.resident_bytes and everything.plan == small.plan


def test_trim(made, model, build_inputs, run, same, at_ratio):
    """`trim` drops what the plan does not run, and a later plan reads it back."""
    model.set_ratio(0.6)
    before = model.resident_bytes
    model.trim()
    assert model.resident_bytes < before
    kept = [*model.transformer_blocks, *model.students.values()]
    assert len(kept) == len(model.plan.blocks)
    same(run(model, build_inputs()), at_ratio[0.6])
    for ratio in (1.0, 0.7, 0.6):
        model.set_ratio(ratio)
        same(run(model, build_inputs()), at_ratio[ratio])
    assert list(model.transformer_blocks._modules) == ["0", "1", "2", "3"]


def test_trim_keeps_a_schedule(made, model, build_inputs, run, same):
    """`trim` with a schedule keeps what any of its phases runs."""
    model.set_schedule(Schedule(phases=((0, 0.75), (1, 0.6))))
    model.trim()
    wanted = {
        planned.interval for ratio in (0.75, 0.6) for planned in model.planner.plan(ratio).blocks if not planned.student
    }
    assert {int(key) for key in model.transformer_blocks._modules} == {blocks.first for blocks in wanted}
    inputs = build_inputs()
    for timestep, group in zip((0.95, 0.3), denoise(model, inputs, run, (0.95, 0.3)), strict=True):
        reference = made.reference(model.planner.plan(0.75 if timestep == 0.95 else 0.6))
        same(group[0], run(reference, {**inputs, "timestep": torch.full((3,), timestep)}))


@pytest.mark.parametrize("scheduled", [False, True])
def test_trim_frees(made, model, scheduled):
    """What `trim` drops is gone from memory, not only from `resident_bytes`."""
    plan = made.plan(PlannedBlock(interval=Interval(0, 0), width=FULL))
    if scheduled:
        model.set_schedule(Schedule.constant(plan))
    else:
        model.set_plan(plan)
    dropped = weakref.ref(model.transformer_blocks[3])
    model.trim()
    gc.collect()
    assert dropped() is None


def test_trim_inside_at(made, model, build_inputs, run, same, at_ratio):
    """`trim` inside `at` keeps the default's blocks: it still has to run, and to be moved and saved with the model."""
    model.set_ratio(1.0)
    with model.at(ratio=0.6):
        model.trim()
    same(run(model, build_inputs()), at_ratio[1.0])
    held = {id(module) for module in model.modules()}
    assert all(id(call.block) in held for call in model._program().calls)


def test_load_reads_what_the_plan_needs(made, reads):
    """Blocks that are not in the plan are not read, nor students; no tensor is read twice."""
    plan = made.plan(
        PlannedBlock(interval=Interval(0, 1), width=Width(heads=2, image=50, text=31, modulation=32), student=True),
        PlannedBlock(interval=Interval(3, 3), width=FULL),
    )
    model = ppcl_rt.load(made.folder, plan=plan)
    assert len(reads) == len(set(reads))
    homes = {".".join(name.split(".")[:2]) for name in reads if name.startswith(("transformer_blocks.", "students."))}
    assert homes == {"students.0-1", "transformer_blocks.3"}
    assert list(model.students) == ["0-1"] and list(model.transformer_blocks._modules) == ["3"]
    reads.clear()
    model.set_plan(made.catalog.dense)
    assert {name.split(".")[1] for name in reads} == {"0", "1", "2"}


def test_load_reads_fitted_layers_it_needs(compensated, reads):
    """Of the fitted layers only those of the plan's counts are read, and in place of the full one."""
    plan = compensated.plan(
        PlannedBlock(interval=Interval(2, 2), width=Width(heads=3, image=128, text=31, modulation=32))
    )
    ppcl_rt.load(compensated.folder, plan=plan)
    narrow = {name.split("replacements.")[1].split(".")[0] for name in reads if ".replacements." in name}
    assert narrow == {"attn_image_3", "attn_text_3", "mlp_text_31"}
    assert not {f"transformer_blocks.2.{path}.weight" for path in ("attn.to_out.0", "txt_mlp.net.2")} & set(reads)
    assert "transformer_blocks.2.img_mlp.net.2.weight" in reads


def test_whole_residence_reads_no_more(made, reads):
    """``resident="all"`` reads every tensor once, and nothing afterwards."""
    model = ppcl_rt.load(made.folder, 0.6, resident="all")
    assert sorted(set(reads)) == sorted(made.tensors)
    reads.clear()
    rng = np.random.default_rng(0)
    for _ in range(20):
        model.set_plan(made.random_plan(rng, skip=0.2))
    assert not reads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(made, build_inputs, run, dtype):
    """Weights come in the dtype that was asked for, those read later too, and the result is the stock model's in it."""
    model = ppcl_rt.load(made.folder, 0.6, dtype=dtype, device="cpu")
    model.set_ratio(0.95)
    model.set_ratio(1.0)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
    inputs = build_inputs()
    inputs |= {name: inputs[name].to(dtype) for name in ("hidden_states", "encoder_hidden_states")}
    got, wanted = run(model, inputs), run(copy.deepcopy(made.stock).to(dtype), inputs)
    # The same operations in the same dtype, in an order that may differ: a few steps of its precision, at size 4.
    assert got.dtype == dtype and (got - wanted).abs().max() <= 16 * torch.finfo(dtype).eps * wanted.abs().max().clamp(
        1
    )


def test_device(made):
    """Everything lands on the device that was asked for, also what is read later."""
    model = ppcl_rt.load(made.folder, 0.6, device="meta")
    model.set_ratio(1.0)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_moved_model_grows_where_it_is(made, build_inputs, run):
    """After ``.to``, later weights follow the model's dtype, and its mode and frozenness."""
    model = ppcl_rt.load(made.folder, 0.6).to(torch.float64).requires_grad_(False)
    model.set_ratio(1.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train().set_plan(made.plan(PlannedBlock(interval=Interval(3, 3), width=FULL, student=True)))
    assert all(module.training for module in model.modules())


def test_grown_blocks_keep_the_backend(made):
    """An attention backend that was set holds for blocks that are read later."""
    model = ppcl_rt.load(made.folder, 0.6)
    model.set_attention_backend("_native_math")
    model.set_ratio(1.0)
    assert len({block.attn.processor._attention_backend for block in model.transformer_blocks}) == 1


def test_attention_backend(made, model, build_inputs, run, same):
    """diffusers' attention backends are called, with the mask, and give the same result."""
    inputs = build_inputs()
    model.set_attention_backend("_native_math")
    same(run(model, inputs), run(made.stock, inputs))


def test_deepcopy(made, model, build_inputs, run, same, at_ratio):
    """A copy runs on its own weights and switches on its own."""
    inputs = build_inputs()
    model.set_ratio(0.7)
    other = copy.deepcopy(model)
    assert other.plan == model.plan
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    same(run(other, inputs), at_ratio[0.7])
    other.set_ratio(1.0)
    same(run(other, inputs), at_ratio[1.0])
    assert model.plan == model.planner.plan(0.7)


# Training and wrappers.


def test_gradient_checkpointing(made, model, build_inputs, same):
    """Recomputed in backward = kept from forward, for the output and every gradient, in training mode."""
    plan = made.plan(
        PlannedBlock(interval=Interval(0, 1), width=Width(heads=2, image=50, text=31, modulation=32), student=True),
        PlannedBlock(interval=Interval(3, 3), width=FULL),
    )
    model.train()
    results = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        # The plan is over by the time that backward recomputes.
        with model.at(plan=plan):
            output = model(**build_inputs()).sample
        output.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.detach(), grads))
    (plain, grads), (again, regrads) = results
    same(again, plain)
    assert grads.keys() == regrads.keys() and any(name.startswith("students.0-1.") for name in grads)
    assert not any(name.startswith(("transformer_blocks.0.", "transformer_blocks.1.")) for name in grads)
    for name, grad in grads.items():
        same(regrads[name], grad)


def test_gradients_are_stock_gradients(made, model, build_inputs, same):
    """The dense plan's gradients are diffusers', in rank order."""
    model.set_ratio(1.0)
    stock = copy.deepcopy(made.stock)
    for each in (model, stock):
        each(**build_inputs()).sample.square().mean().backward()
    for n, block in enumerate(model.transformer_blocks):
        other = stock.transformer_blocks[n]
        order = made.tensors[f"transformer_blocks.{n}.order.image"]
        same(block.img_mlp.net[0].proj.weight.grad, other.img_mlp.net[0].proj.weight.grad[order])
        same(block.img_mlp.net[2].weight.grad, other.img_mlp.net[2].weight.grad[:, order])
        same(block.img_mod[1].weight.grad, other.img_mod[1].weight.grad)


def test_hooked_layers_are_called(made, model, build_inputs, run, same):
    """A hook on a linear layer is called, and the result at a narrower width is what it is without."""
    plan = made.random_plan(np.random.default_rng(3))
    model.set_plan(plan)
    inputs = build_inputs()
    wanted, called = run(model, inputs), []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(("transformer_blocks.", "students.")):
            handles.append(module.register_forward_hook(lambda module, _args, _out: called.append(module)))
    same(run(model, inputs), wanted)
    for call in model._program().calls:
        linears = [module for module in call.block.modules() if isinstance(module, torch.nn.Linear)]
        assert len(linears) == 14 and all(any(each is module for each in called) for module in linears)
    for handle in handles:
        handle.remove()
    called.clear()
    same(run(model, inputs), wanted)
    assert not called


@pytest.mark.parametrize("out_features", [None, 1, 7, 12])
@pytest.mark.parametrize("in_features", [1, 9, 10])
def test_wrapped_linear(same, in_features, out_features):
    """`ops.linear` = the first rows over the first columns, whether it reads the weights or calls the module."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(10, 12), torch.randn(2, 5, in_features)
    rows = 12 if out_features is None else out_features
    wanted = x @ layer.weight[:rows, :in_features].T + layer.bias[:rows]
    same(ops.linear(layer, x, out_features), wanted)

    class Adapter(torch.nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    adapter = Adapter(10, 12)
    adapter.load_state_dict(layer.state_dict())
    same(ops.linear(adapter, x, out_features), wanted)
    assert adapter.calls == 1


def test_plan_is_for_reading_only(model):
    """Plans are values: neither the plan nor the catalog can be changed in place."""
    with pytest.raises(ValueError):
        model.plan.depth = 3
    with pytest.raises(ValueError):
        model.catalog.family = "flux"


def test_bad_arguments(made, build_inputs, model):
    """A mask of another length and a wrong ``resident`` are refused with what was wanted; unknown arguments too."""
    inputs = build_inputs()
    with pytest.raises(ValueError, match="encoder_hidden_states_mask"):
        model(**{**inputs, "encoder_hidden_states_mask": torch.ones(3, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match="resident"):
        ppcl_rt.load(made.folder, resident="some")
    with pytest.raises((ValueError, TypeError)):
        ppcl_rt.load(made.folder, resdient="all")


def test_growing_keeps_what_was_trained(made):
    """A block that was changed in memory grows around the change instead of reading over it."""
    small = made.plan(
        ppcl_rt.PlannedBlock(
            interval=ppcl_rt.Interval(0, 0), width=ppcl_rt.Width(heads=1, image=17, text=31, modulation=32)
        )
    )
    model = ppcl_rt.load(made.folder, plan=small)
    with torch.no_grad():
        for parameter in model.transformer_blocks.parameters():
            parameter.fill_(7.0)
    model.set_ratio(1.0)
    block = model.transformer_blocks[0]
    up, down = block.img_mlp.net[0].proj, block.img_mlp.net[2]
    assert (up.weight[:17] == 7).all() and not (up.weight[17:] == 7).any()
    assert (down.weight[:, :17] == 7).all() and not (down.weight[:, 17:] == 7).any()


def test_projections_lie_side_by_side(made, build_inputs, run, same, tmp_path):
    """q, k and v of a stream are one tensor in memory: after loading, growing and moving; files do not notice."""
    model = ppcl_rt.load(made.folder, 0.5)

    def packed(model):
        return [
            side_by_side([block.get_submodule(path).weight for path in paths]) is not None
            for block in (*model.transformer_blocks, *model.students.values())
            for paths in block.side_by_side
        ]

    assert packed(model) and all(packed(model))
    model.set_ratio(1.0)
    assert all(packed(model))
    before = dict(model.named_parameters())
    wanted = run(model, build_inputs())
    model.to(torch.float64).to(torch.float32)
    assert all(packed(model)) and all(p is before[name] for name, p in model.named_parameters())
    model.save_pretrained(tmp_path / "saved")
    same(run(ppcl_rt.load(tmp_path / "saved"), build_inputs()), wanted)
    # Whoever puts a layer of another kind there is left alone.
    adapted = torch.nn.Sequential(model.transformer_blocks[0].attn.to_k)
    adapted.in_features = adapted[0].in_features
    model.transformer_blocks[0].attn.to_k = adapted
    model.to(torch.float64).to(torch.float32)
    assert model.transformer_blocks[0].attn.to_k is adapted
    same(run(model, build_inputs()), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_block_grows_whatever_its_dtype(made, build_inputs, run, dtype):
    """What a caller has cast, or casts for each layer, is kept as it is while the block grows around it."""
    small = made.plan(PlannedBlock(interval=Interval(1, 1), width=Width(heads=2, image=33, text=65, modulation=32)))
    model = ppcl_rt.load(made.folder, plan=small)
    [block] = model.blocks()
    with torch.no_grad():
        block.attn.to_q.weight += 1
    kept = block.attn.to_q.weight.detach().clone()
    block.to(dtype)
    model.set_ratio(1.0)
    grown = model.blocks()[1].attn.to_q.weight
    assert grown.dtype == torch.float32 and grown.shape[0] == 32
    assert torch.equal(grown[: len(kept)], kept.to(dtype).float())
    # The norms of the block are still as the caller cast them.
    assert run(model.float(), build_inputs()).isfinite().all()


def test_no_token_is_sent_where_none_is_wanted(monkeypatch):
    """``token=False`` tells the hub's library to send no token, not even a stored one: it has to arrive there."""
    seen = {}

    def fetch(*_, **more):
        seen.update(more)
        raise OSError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ValueError, match="neither a checkpoint folder nor a hub id"):
        ppcl_rt.load("no/such", token=False)
    assert seen["token"] is False and "revision" not in seen and "local_files_only" not in seen
