"""Several processes for one sample: context parallel by Ulysses (`enable_parallelism` of diffusers).

Each process holds all weights and its share of the tokens; for attention, processes exchange tokens for heads. So a
plan has to keep a number of heads that the processes divide.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class ContextParallel(nn.Module):
    """Mixin: `enable_parallelism` of diffusers, as far as it runs here.

    Attributes:
        splits_tokens: whether the family's class says where tokens are split (``_cp_plan``), at no block.
    """

    splits_tokens: ClassVar[bool] = False
    # Of diffusers' classes from 0.41 on: what was enabled.
    _parallel_config: Any = None

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Split the tokens among processes; see diffusers.

        Raises:
            ValueError: tensor parallel, ring attention, a plan of one's own, or a family that splits no tokens.
        """
        context = getattr(config, "context_parallel_config", config)
        if getattr(config, "tensor_parallel_config", None) is not None or not hasattr(context, "ulysses_degree"):
            raise ValueError(
                "tensor parallel does not run here, where a plan narrows the layers: take "
                "ContextParallelConfig(ulysses_degree=...), or a lower ratio on one device"
            )
        if context.ring_degree > 1 or getattr(context, "ulysses_anything", False):
            raise ValueError(
                "of context parallel, ring attention and ulysses_anything do not run here: take "
                "ContextParallelConfig(ulysses_degree=...) alone"
            )
        if not self.splits_tokens:
            raise ValueError(
                f"context parallel does not run on {type(self).__name__}: run one sample on one device, "
                "others on other devices"
            )
        if cp_plan is not None:
            raise ValueError("cp_plan is the model's own here, because a plan leaves blocks out: leave it out")
        stock: Any = super()
        stock.enable_parallelism(config=config)


def check_heads(heads: int, parallel: Any) -> None:
    """Refuse a number of heads that the processes do not divide.

    Raises:
        ValueError: they do not.
    """
    degree = parallel.context_parallel_config.ulysses_degree
    if heads % degree:
        raise ValueError(
            f"a block of the plan runs {heads} heads, which {degree} processes do not divide: "
            "run at ratio 1, or at a plan whose numbers of heads they divide"
        )
