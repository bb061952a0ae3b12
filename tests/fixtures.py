"""Tiny models, inputs and checkpoints that all tests share; every one is seeded."""

from __future__ import annotations

import os

import torch

# Kernels run on CPU tensors through triton's interpreter where there is no GPU; triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fast_interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    fast_interpreter.speed_up()

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from PIL import Image
from torch import nn

import ppcl_rt
from ppcl_rt.cli import main as cli
from ppcl_rt.families.qwen_image import block_spec
from ppcl_rt.ops.operation import drop_prepared_calls
from ppcl_rt.planning.plan import text_maps

HEADS, HEAD_DIM, DEPTH = 4, 8, 4
DIM, CHANNELS = HEADS * HEAD_DIM, 4 * HEADS * HEAD_DIM
SPEC = block_spec(DIM, HEADS, HEAD_DIM)
FULL = SPEC.full
# Some counts (50, 31, 17) that no tile divides.
NARROWER = {"heads": (3, 2, 1), "image": (96, 50, 17), "text": (100, 64, 31), "modulation": ()}
# With linear maps in place of MLPs, and modulations of a low rank.
WITH_MAPS = {**NARROWER, "image": (96, 50, 0), "text": (64, 31, 0), "modulation": (7, 5, 1)}
TEXT_RUNS = ((0, 1), (0, 2), (1, 2), (2, 3))
STUDENTS = ((0, 1), (1, 2), (3, 3))
CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": DEPTH,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


@pytest.fixture(autouse=True)
def own_attention_backend() -> Iterator[None]:
    """``model.set_attention_backend`` of diffusers sets the backend of the whole process: it ends with the test."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.fixture(autouse=True)
def chosen_anew() -> None:
    """Choose implementations anew: else a test runs what an earlier test prepared, whatever it asks for."""
    drop_prepared_calls()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine, in fixtures too; the models are too small for two threads anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _roughen(module: nn.Module, seed: int) -> None:
    """Move every parameter, also those that start at 0 or 1, far enough that leaving one out shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)


def _build_stock(seed: int = 0, **changes: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(**{**CONFIG, **changes})
    _roughen(model, seed)
    return model.eval()


def _build_block(seed: int) -> QwenImageTransformerBlock:
    torch.manual_seed(seed)
    block = QwenImageTransformerBlock(DIM, HEADS, HEAD_DIM)
    _roughen(block, seed)
    return block.eval()


def _build_inputs(
    seed: int = 0,
    batch: int = 3,
    text: int = 7,
    images: Sequence[tuple[int, int, int]] = ((1, 3, 5),),
    mask: str = "random",
) -> dict[str, Any]:
    """Make the arguments of a forward; odd token counts. `mask`: none, random, scattered, rows (some all false)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(frames * rows * columns for frames, rows, columns in images)
    masks = {
        "none": None,
        "random": torch.rand(batch, text, generator=generator) < 0.6,
        "scattered": torch.arange(text).expand(batch, text) % 2 == 1,
        "rows": (torch.arange(batch) % 2 == 1)[:, None].expand(batch, text).clone(),
        "prefix": torch.arange(text)[None] < torch.arange(1, batch + 1)[:, None],
    }
    return {
        "hidden_states": torch.randn(batch, tokens, CONFIG["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, CONFIG["joint_attention_dim"], generator=generator),
        "encoder_hidden_states_mask": masks[mask],
        "timestep": torch.rand(batch, generator=generator),
        "img_shapes": [list(images)] * batch,
    }


def _random_widths(rng: np.random.Generator, groups: dict[str, tuple[int, ...]]) -> ppcl_rt.LegalWidths:
    options = {}
    for (group, counts), full in zip(groups.items(), FULL.values(), strict=True):
        losses = np.cumsum(rng.uniform(0.01, 1.0, len(counts)))
        options[group] = (
            ppcl_rt.LegalCount(full, 0.0),
            *(ppcl_rt.LegalCount(count, float(loss)) for count, loss in zip(counts, losses, strict=True)),
        )
    return ppcl_rt.LegalWidths(**options)


def _put_map(
    block: QwenImageTransformerBlock, mlp: str, layer: nn.Linear, tensors: dict[str, torch.Tensor], name: str
) -> None:
    """Make a stock block compute ``g + l(g)`` in place of a stream's MLP: gate 1, and an MLP that sees ``g`` itself."""
    stream, seen = mlp.split("_")[0], {}
    layer.load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")})
    modulation = getattr(block, f"{stream}_mod")[1]
    with torch.no_grad():
        modulation.weight[5 * DIM :], modulation.bias[5 * DIM :] = 0, 1
    getattr(block, f"{stream}_norm2").register_forward_pre_hook(lambda _, args: seen.update(g=args[0]))
    getattr(block, mlp).register_forward_hook(lambda *_: layer(seen["g"]))


@dataclass
class Made:
    """A checkpoint on disk, and what it was made of, for tests to compute by hand what it should do."""

    folder: Path
    stock: QwenImageTransformer2DModel
    config: dict[str, Any]
    catalog: ppcl_rt.Catalog
    tensors: dict[str, torch.Tensor] = field(repr=False)

    def prefix(self, planned: ppcl_rt.PlannedBlock) -> str:
        return (
            f"students.{planned.interval.key}." if planned.student else f"transformer_blocks.{planned.interval.first}."
        )

    def stock_block(self, planned: ppcl_rt.PlannedBlock) -> QwenImageTransformerBlock:
        """diffusers' block with the weights that a step names, at full width."""
        if not planned.student:
            return copy.deepcopy(self.stock.transformer_blocks[planned.interval.first])
        edit = self.stock.config.zero_cond_t
        block = QwenImageTransformerBlock(DIM, HEADS, HEAD_DIM, zero_cond_t=edit).eval()
        prefix = self.prefix(planned)
        state = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        block.load_state_dict(
            {name: t for name, t in state.items() if not name.startswith(("order.", "replacements."))}
        )
        return block

    def kept(self, planned: ppcl_rt.PlannedBlock, group: str) -> list[int]:
        """Columns of the output layers that a step keeps: those of the first heads or channels in rank order."""
        count = planned.width[group]
        full = FULL[group]
        order = self.tensors.get(f"{self.prefix(planned)}order.{group}", torch.arange(full)).tolist()[:count]
        unit = HEAD_DIM if group == "heads" else 1
        return [index * unit + offset for index in order for offset in range(unit)]

    def reference_block(self, planned: ppcl_rt.PlannedBlock) -> QwenImageTransformerBlock:
        """diffusers' block, with what a step leaves out zeroed in its output layers, or fitted layers in place."""
        block = self.stock_block(planned)
        if planned.width["modulation"] < DIM:
            self._lower_rank(block, f"{self.prefix(planned)}replacements.", planned.width["modulation"])
        for output in SPEC.outputs:
            group, path = output.segment.group, output.part.path
            if group not in planned.width:
                # Not updated: `_skip_text` says what such a block does.
                continue
            count, kept, layer = planned.width[group], self.kept(planned, group), block.get_submodule(path)
            if count == 0:
                _put_map(
                    block,
                    path.split(".")[0],
                    nn.Linear(DIM, DIM),
                    self.tensors,
                    f"{self.prefix(planned)}replacements.{output.name}_0",
                )
                continue
            zeroed = torch.zeros_like(layer.weight)
            narrow = f"{self.prefix(planned)}replacements.{output.name}_{count}"
            with torch.no_grad():
                if f"{narrow}.weight" in self.tensors:
                    zeroed[:, kept] = self.tensors[f"{narrow}.weight"]
                    layer.bias.copy_(self.tensors[f"{narrow}.bias"])
                else:
                    zeroed[:, kept] = layer.weight[:, kept]
                layer.weight.copy_(zeroed)
        return block

    def _lower_rank(self, block: QwenImageTransformerBlock, prefix: str, rank: int) -> None:
        """Put the product of the two factors into the stock modulations, image first."""
        down, down_bias = (self.tensors[f"{prefix}modulation_down.{part}"] for part in ("weight", "bias"))
        for stream, modulation in (("image", block.img_mod[1]), ("text", block.txt_mod[1])):
            up, up_bias = (self.tensors[f"{prefix}modulation_{stream}.{part}"] for part in ("weight", "bias"))
            with torch.no_grad():
                modulation.weight.copy_(up[:, :rank] @ down[:rank])
                modulation.bias.copy_(up[:, :rank] @ down_bias[:rank] + up_bias)

    def reference(self, plan: ppcl_rt.Plan) -> QwenImageTransformer2DModel:
        """diffusers' model for a plan, by the law of it: columns zeroed, students put in, skipped blocks left out."""
        model = copy.deepcopy(self.stock)
        model.transformer_blocks = nn.ModuleList([self.reference_block(planned) for planned in plan.blocks])
        blocks = {
            planned.interval.first: block for planned, block in zip(plan.blocks, model.transformer_blocks, strict=True)
        }
        for run in plan.text_runs:
            self._skip_text([blocks[n] for n in run], run)
        return model

    def _skip_text(self, blocks: list[QwenImageTransformerBlock], run: ppcl_rt.Interval) -> None:
        """Make stock blocks of a text run: all but the first read ``z + l(z)`` of the first's input, gates 0."""

        def mapped(name: str, x: torch.Tensor) -> torch.Tensor:
            weight, bias = (self.tensors[f"text_runs.{run.key}.{name}.{part}"] for part in ("weight", "bias"))
            return x + x @ weight.T + bias

        seen = {}

        def see(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            seen["z"] = kwargs["encoder_hidden_states"]

        blocks[0].attn.register_forward_pre_hook(see, with_kwargs=True)
        for number, block in zip(list(run)[1:], blocks[1:], strict=True):
            with torch.no_grad():
                # Shift, scale and gate of the attention half, and the gate of the MLP half.
                for rows in (slice(3 * DIM), slice(5 * DIM, None)):
                    block.txt_mod[1].weight[rows], block.txt_mod[1].bias[rows] = 0, 0
            block.txt_norm1.register_forward_hook(lambda _, __, ___, name=f"z_{number}": mapped(name, seen["z"]))
        if run.last < DEPTH - 1:
            blocks[-1].register_forward_hook(lambda _, __, out: (mapped("text", out[0]), out[1]))

    def plan(self, *blocks: ppcl_rt.PlannedBlock) -> ppcl_rt.Plan:
        depth = self.catalog.architecture.depth
        return ppcl_rt.Plan(checkpoint=self.catalog.fingerprint, depth=depth, blocks=blocks)

    def random_plan(self, rng: np.random.Generator, skip: float = 0.0, legal: bool = False) -> ppcl_rt.Plan:
        """A plan with a random set of disjoint students; counts from the catalog (``legal``) or any."""

        def width(widths: ppcl_rt.LegalWidths) -> ppcl_rt.Width:
            if legal:
                return ppcl_rt.Width({g: int(rng.choice([c.units for c in widths.of(g)])) for g in FULL})
            # Modulations come at full rank, or at any up to the highest that was factored.
            ranks = [*range(1, widths.highest_rank("modulation") + 1), DIM]
            units = {g: int(rng.integers(1, FULL[g] + 1)) for g in SPEC.unit_groups}
            return ppcl_rt.Width(units, modulation=int(rng.choice(ranks)))

        planned, block = [], 0
        while block < self.catalog.architecture.depth:
            here = [student for student in self.catalog.students if student.interval.first == block]
            if here and rng.random() < 0.5:
                student = here[int(rng.integers(len(here)))]
                planned.append(
                    ppcl_rt.PlannedBlock(interval=student.interval, width=width(student.widths), student=True)
                )
                block = student.interval.last + 1
                continue
            if rng.random() >= skip:
                interval = ppcl_rt.Interval(block, block)
                planned.append(ppcl_rt.PlannedBlock(interval=interval, width=width(self.catalog.blocks[block])))
            block += 1
        kept = {each.interval.first: each.width for each in planned if not each.student}
        runs: list[ppcl_rt.Interval] = []
        for n in rng.permutation(len(self.catalog.text_runs)):
            run = self.catalog.text_runs[n].interval
            if (
                all(b in kept for b in run)
                and not any(b in other for other in runs for b in run)
                and rng.random() < 0.7
            ):
                runs.append(run)
        students = [each for each in planned if each.student]
        return self.catalog.compose(kept.items(), students, runs)


def _make_checkpoint(
    folder: Path,
    seed: int = 0,
    students: Sequence[tuple[int, int]] = STUDENTS,
    compensated: bool = False,
    max_shard_size: int | str = "10GB",
    groups: dict[str, tuple[int, ...]] = NARROWER,
    text_runs: Sequence[tuple[int, int]] = (),
    edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None] | None = None,
    **changes: Any,
) -> Made:
    """Write a pluggable checkpoint; ``edit`` may spoil config and tensors before they are written with checksums."""
    stock = _build_stock(seed, **changes)
    config = {**dict(stock.config), "_class_name": "QwenImageTransformer2DModel"}
    config.pop("_name_or_path", None)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tensors = {name: tensor.detach().clone() for name, tensor in stock.state_dict().items()}
    listed = []
    for n, (first, last) in enumerate(students):
        interval = ppcl_rt.Interval(first, last)
        listed.append(
            ppcl_rt.Student(
                interval=interval, start="first", loss=float(rng.uniform(0.5, 2.0)), widths=_random_widths(rng, groups)
            )
        )
        block = _build_block(1000 + 100 * seed + n)
        tensors |= {f"students.{interval.key}.{name}": tensor for name, tensor in block.state_dict().items()}
    outer = sum(p.numel() for n, p in stock.named_parameters() if not n.startswith("transformer_blocks."))
    architecture = ppcl_rt.PPCLQwenImageTransformer2DModel.architecture_of(stock.config, outer)
    catalog = ppcl_rt.Catalog(
        family="qwen-image",
        reference=ppcl_rt.Tokens(16, 7),
        architecture=architecture,
        blocks=tuple(_random_widths(rng, groups) for _ in range(architecture.depth)),
        students=tuple(listed),
        text_runs=tuple(
            ppcl_rt.TextRun(interval=ppcl_rt.Interval(*run), loss=float(rng.uniform(0.01, 0.5))) for run in text_runs
        ),
        compensated=compensated,
    )
    for run in catalog.text_runs:
        for name in text_maps(run.interval, architecture.depth):
            tensors[f"text_runs.{run.interval.key}.{name}.weight"] = torch.randn(DIM, DIM, generator=generator) * 0.2
            tensors[f"text_runs.{run.interval.key}.{name}.bias"] = torch.randn(DIM, generator=generator) * 0.2
    prefixes = {f"transformer_blocks.{n}": widths for n, widths in enumerate(catalog.blocks)}
    prefixes |= {f"students.{student.interval.key}": student.widths for student in catalog.students}
    for prefix, widths in prefixes.items():
        for group, full in FULL.items():
            if group != "modulation":
                tensors[f"{prefix}.order.{group}"] = torch.randperm(full, generator=generator)
        made = {}
        for output in SPEC.outputs:
            for legal in widths.of(output.segment.group)[1:]:
                if compensated or legal.units == 0:
                    columns = legal.units * output.segment.unit or DIM
                    made[SPEC.replacement(output.name, legal.units)] = (output.part.rows, columns)
        rank = widths.highest_rank("modulation")
        if rank:
            made |= {
                "modulation_down": (rank, DIM),
                **{f"modulation_{stream}": (6 * DIM, rank) for stream in ("image", "text")},
            }
        for name, (rows, columns) in made.items():
            tensors[f"{prefix}.replacements.{name}.weight"] = torch.randn(rows, columns, generator=generator) * 0.2
            tensors[f"{prefix}.replacements.{name}.bias"] = torch.randn(rows, generator=generator) * 0.2
    if edit is not None:
        edit(config, tensors)
    catalog = ppcl_rt.write_checkpoint(folder, config, catalog, tensors, max_shard_size)
    return Made(folder, stock, config, catalog, tensors)


@pytest.fixture(scope="session")
def build_stock() -> Callable[..., QwenImageTransformer2DModel]:
    """diffusers' model, tiny and random: ``build_stock(seed, **config)``."""
    return _build_stock


@pytest.fixture(scope="session")
def build_inputs() -> Callable[..., dict[str, Any]]:
    """Arguments of a forward: ``build_inputs(seed, batch, text, images, mask)``."""
    return _build_inputs


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Made]:
    """Write a checkpoint: ``make_checkpoint(folder, students=..., compensated=..., max_shard_size=...)``."""
    return _make_checkpoint


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The usual checkpoint: one file, students that overlap, plain prefixes. For reading only."""
    return _make_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint")


@pytest.fixture(scope="session")
def compensated(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same with fitted output layers, in several files. For reading only."""
    folder = tmp_path_factory.mktemp("compensated") / "checkpoint"
    return _make_checkpoint(folder, seed=1, compensated=True, max_shard_size=200_000)


@pytest.fixture(scope="session")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One whose MLPs have linear maps and whose modulations come at low ranks. For reading only."""
    folder = tmp_path_factory.mktemp("mapped") / "checkpoint"
    return _make_checkpoint(folder, seed=2, compensated=True, groups=WITH_MAPS, text_runs=TEXT_RUNS)


@pytest.fixture(scope="session")
def run() -> Callable[..., torch.Tensor]:
    """Forward without gradients: ``run(model, inputs, **more)``."""

    def _run(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, **more, return_dict=False)[0]

    return _run


@pytest.fixture(scope="session")
def same() -> Callable[..., None]:
    """Assert float32 outputs equal up to the order of summation."""

    def _same(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
        # Outputs are of size 1. A dot product of 128 terms in another order moves by some 128 * 6e-8; a few blocks in a
        # row make 1e-5. A head or channel taken for another moves them by 1e-2 and more.
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert torch.isfinite(wanted).all()
        error = (got - wanted).abs()
        assert error.max() <= tolerance, f"off by {error.max():.2e} at most, {error.square().mean().sqrt():.2e} RMS"
        assert error.square().mean().sqrt() <= tolerance / 3

    return _same


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything of a Qwen-Image pipeline but its transformer, tiny and random, made without a network."""
    # Here, because they take seconds that most tests need not wait for.
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    # One token a byte and no merges: all that a tokenizer needs in order to read any prompt.
    (folder / "vocab.json").write_text(json.dumps({c: n for n, c in enumerate(sorted(ByteLevel.alphabet()))}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), extra_special_tokens=special[1:])
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config).eval(),
        "vae": AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.3, -0.2, 0.1, 0.0],
            latents_std=[0.8, 1.2, 1.0, 0.9],
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


@pytest.fixture(scope="session")
def qwen_folder(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Qwen-Image pipeline, tiny and random, as `QwenImagePipeline.save_pretrained` writes it."""
    from diffusers import QwenImagePipeline

    folder = tmp_path_factory.mktemp("pipeline")
    QwenImagePipeline(**parts, transformer=_build_stock()).save_pretrained(folder)
    return folder


# Captions and sizes in pixels of the images that are cached for tests; several shapes, one more than once.
CAPTIONED = {
    "a red square at a1": (40, 40),
    "a green circle at b2": (64, 40),
    "a blue triangle at c3": (40, 64),
    "a yellow cross at d4": (50, 48),
    "a magenta ring at a2": (96, 48),
    "a cyan stripe at b3": (41, 40),
    "a red ring at c4": (40, 41),
    "a blue square at d1": (33, 65),
}


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight noisy images, ``0.png`` and so on, captions beside them. For reading only."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n, (caption, (width, height)) in enumerate(CAPTIONED.items()):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(caption + "\n")
    return folder


@pytest.fixture(scope="session")
def qwen_cache(qwen_folder: Path, captioned_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of these images near 32 x 32 pixels, float32, through the tiny pipeline. For reading only."""
    from ppcl_train.data import caching, captioned
    from ppcl_train.families import base as family

    encoder = family.of("qwen-image").open(str(qwen_folder), device="cpu", dtype=torch.float32, draws=False)
    folder, reader = tmp_path_factory.mktemp("cache"), captioned.Folder(captioned_folder)
    more = {"settings": {}, "dtype": torch.float32, "area": 32 * 32, "per_shard": 3}
    caching.cache("qwen-image", encoder, reader, folder, **more)
    return folder


@pytest.fixture
def ppcl(monkeypatch, capsys):
    """Run the program in this process; returns (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return run
