"""What tensors were called where a model was first published.

A family whose original names differ has a table of rules here and calls `originals`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ppcl_rt.model.exchange import Original, Shapes


class Rule(NamedTuple):
    """What one layer, or tensor, was called.

    Attributes:
        stock: paths by diffusers, ``{}`` for a block's number; several that lay in one, rows after rows.
        original: its path. With a suffix ``.weight`` in ``stock``, both are names of a tensor.
        swapped: whether diffusers has scale before shift where the layer makes just these two, and the original has
            shift before scale.
    """

    stock: tuple[str, ...]
    original: str
    swapped: bool = False


def originals(shapes: Shapes, rules: Sequence[Rule]) -> dict[str, Original]:
    """What tensors with these names and shapes lie in, by original name; see `Exchange.originals`.

    A name that no rule has is the same.

    Raises:
        KeyError: some of what lies in one tensor is not there.
    """
    by_first = {rule.stock[0]: rule for rule in rules}
    others = {path for rule in rules for path in rule.stock[1:]}
    found: dict[str, Original] = {}
    for name in shapes:
        for path, leaf in _readings(name):
            number, general = _number(path)
            if general in others:
                break
            if (rule := by_first.get(general)) is not None:
                parts = tuple(each.format(number) + leaf for each in rule.stock)
                if lost := next((part for part in parts if part not in shapes), None):
                    raise KeyError(lost)
                swapped = rule.swapped and _makes_two(shapes[f"{path}.weight"])
                found[rule.original.format(number) + leaf] = Original(parts, swapped)
                break
        else:
            found[name] = Original((name,))
    return found


def _readings(name: str) -> Iterator[tuple[str, str]]:
    """A name as that of a tensor, and as the path of a layer with ``.weight`` or ``.bias`` after it."""
    yield name, ""
    path, _, leaf = name.rpartition(".")
    yield path, f".{leaf}"


def _number(path: str) -> tuple[str, str]:
    """The number of a path's block, and the path with ``{}`` in its place."""
    match = re.match(r"(\w+)\.(\d+)\.(.+)", path)
    return (match[2], f"{match[1]}.{{}}.{match[3]}") if match else ("", path)


def _makes_two(shape: Sequence[int]) -> bool:
    return shape[0] == 2 * shape[1]


def _qkv(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _SINGLE, _JOINT = "transformer_blocks.{}", "single_transformer_blocks.{}", "joint_blocks.{}"
_EMBED = "time_text_embed"

FLUX = (
    Rule((f"{_EMBED}.timestep_embedder.linear_1",), "time_in.in_layer"),
    Rule((f"{_EMBED}.timestep_embedder.linear_2",), "time_in.out_layer"),
    Rule((f"{_EMBED}.text_embedder.linear_1",), "vector_in.in_layer"),
    Rule((f"{_EMBED}.text_embedder.linear_2",), "vector_in.out_layer"),
    Rule((f"{_EMBED}.guidance_embedder.linear_1",), "guidance_in.in_layer"),
    Rule((f"{_EMBED}.guidance_embedder.linear_2",), "guidance_in.out_layer"),
    Rule(("context_embedder",), "txt_in"),
    Rule(("x_embedder",), "img_in"),
    Rule(("proj_out",), "final_layer.linear"),
    Rule(("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped=True),
    *(
        rule
        for stream, norm, mlp, out, names, added in (
            ("img", "norm1", "ff", "to_out.0", _IMAGE, ""),
            ("txt", "norm1_context", "ff_context", "to_add_out", _TEXT, "added_"),
        )
        for rule in (
            Rule((f"{_DOUBLE}.{norm}.linear",), f"double_blocks.{{}}.{stream}_mod.lin"),
            Rule(_qkv(f"{_DOUBLE}.attn", names), f"double_blocks.{{}}.{stream}_attn.qkv"),
            Rule((f"{_DOUBLE}.attn.norm_{added}q.weight",), f"double_blocks.{{}}.{stream}_attn.norm.query_norm.scale"),
            Rule((f"{_DOUBLE}.attn.norm_{added}k.weight",), f"double_blocks.{{}}.{stream}_attn.norm.key_norm.scale"),
            Rule((f"{_DOUBLE}.attn.{out}",), f"double_blocks.{{}}.{stream}_attn.proj"),
            Rule((f"{_DOUBLE}.{mlp}.net.0.proj",), f"double_blocks.{{}}.{stream}_mlp.0"),
            Rule((f"{_DOUBLE}.{mlp}.net.2",), f"double_blocks.{{}}.{stream}_mlp.2"),
        )
    ),
    Rule((f"{_SINGLE}.norm.linear",), "single_blocks.{}.modulation.lin"),
    Rule((*_qkv(f"{_SINGLE}.attn", _IMAGE), f"{_SINGLE}.proj_mlp"), "single_blocks.{}.linear1"),
    Rule((f"{_SINGLE}.proj_out",), "single_blocks.{}.linear2"),
    Rule((f"{_SINGLE}.attn.norm_q.weight",), "single_blocks.{}.norm.query_norm.scale"),
    Rule((f"{_SINGLE}.attn.norm_k.weight",), "single_blocks.{}.norm.key_norm.scale"),
)

SD3 = (
    Rule(("pos_embed.pos_embed",), "pos_embed"),
    Rule(("pos_embed.proj",), "x_embedder.proj"),
    Rule((f"{_EMBED}.timestep_embedder.linear_1",), "t_embedder.mlp.0"),
    Rule((f"{_EMBED}.timestep_embedder.linear_2",), "t_embedder.mlp.2"),
    Rule((f"{_EMBED}.text_embedder.linear_1",), "y_embedder.mlp.0"),
    Rule((f"{_EMBED}.text_embedder.linear_2",), "y_embedder.mlp.2"),
    Rule(("proj_out",), "final_layer.linear"),
    Rule(("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped=True),
    *(
        rule
        for stream, norm, mlp, attention, out, names, added in (
            ("x_block", "norm1", "ff", "attn", "to_out.0", _IMAGE, ""),
            ("x_block", "", "", "attn2", "to_out.0", _IMAGE, ""),
            ("context_block", "norm1_context", "ff_context", "attn", "to_add_out", _TEXT, "added_"),
        )
        for rule in (
            Rule(_qkv(f"{_DOUBLE}.{attention}", names), f"{_JOINT}.{stream}.{attention}.qkv"),
            Rule((f"{_DOUBLE}.{attention}.norm_{added}q",), f"{_JOINT}.{stream}.{attention}.ln_q"),
            Rule((f"{_DOUBLE}.{attention}.norm_{added}k",), f"{_JOINT}.{stream}.{attention}.ln_k"),
            Rule((f"{_DOUBLE}.{attention}.{out}",), f"{_JOINT}.{stream}.{attention}.proj"),
            # The last block makes two of the text's.
            Rule((f"{_DOUBLE}.{norm}.linear",), f"{_JOINT}.{stream}.adaLN_modulation.1", swapped=True),
            Rule((f"{_DOUBLE}.{mlp}.net.0.proj",), f"{_JOINT}.{stream}.mlp.fc1"),
            Rule((f"{_DOUBLE}.{mlp}.net.2",), f"{_JOINT}.{stream}.mlp.fc2"),
        )
    ),
)

Z_IMAGE = (
    *(
        Rule((f"all_{layer}.2-1.{path}",), f"{layer}.{path}")
        for layer, path in (("final_layer", "linear"), ("final_layer", "adaLN_modulation.1"))
    ),
    Rule(("all_x_embedder.2-1",), "x_embedder"),
    *(
        rule
        for path in ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
        for rule in (
            Rule(_qkv(f"{path}.attention", _IMAGE), f"{path}.attention.qkv"),
            Rule((f"{path}.attention.to_out.0",), f"{path}.attention.out"),
            Rule((f"{path}.attention.norm_q",), f"{path}.attention.q_norm"),
            Rule((f"{path}.attention.norm_k",), f"{path}.attention.k_norm"),
        )
    ),
)
