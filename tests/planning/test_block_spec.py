"""Blocks with several attentions: what they cost, and how catalogs write them."""

from __future__ import annotations

import pytest

from ppcl_rt import BlockSpec, Group, Part, Segment, Width


def spec(heads, groups=("heads", "image_heads")):
    """Two attentions with 4 heads of 8 channels in streams of width 32, without projections to q, k and v."""
    parts = tuple(
        Part(
            path=group,
            name=group,
            rows=32,
            columns=32,
            axis=1,
            segments=(Segment(group, 0, 8),),
            stream="image",
            updates="image",
        )
        for group in groups
    )
    return BlockSpec(dim=32, head_dim=8, heads=heads, groups={name: Group(count=4) for name in groups}, parts=parts)


def test_heads_attend_over_the_tokens_that_are_said():
    two = spec({"heads": "joint", "image_heads": "image"})
    products = 2 * 10 * 32 * 32
    # Scores and their sum with the values: 4 operations for a pair of tokens and a channel.
    assert two.flops(two.full, 10, 7) == 2 * products + 4 * 8 * 4 * (17**2 + 10**2)
    assert two.flops(Width(heads=1, image_heads=3), 10, 7) == products + 4 * 8 * (17**2 + 3 * 10**2)
    assert two.head_groups == {"heads": "joint", "image_heads": "image"}
    assert BlockSpec.model_validate_json(two.model_dump_json()) == two


def test_one_group_of_heads_is_written_as_ever():
    """By its name alone, which older programs read."""
    one = spec("heads", ("heads",))
    assert one.head_groups == {"heads": "joint"} and one.model_dump()["heads"] == "heads"
    assert one.flops(one.full, 10, 7) == 2 * 10 * 32 * 32 + 4 * 8 * 4 * 17**2
    assert spec(None).head_groups == {} and spec(None).flops(spec(None).full, 10, 7) == 2 * 2 * 10 * 32 * 32


def test_heads_of_a_group_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match="name the group more"):
        spec({"heads": "joint", "more": "image"})
