"""Budgets: the most that a plan may cost, in what users pay. Plain data, no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, ValidationInfo, field_serializer, field_validator, model_validator

from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.catalog import MOST_TOKENS, Catalog
from ppcl_rt.planning.costs import Bytes, Cost, Flops, Milliseconds, Params
from ppcl_rt.planning.frozen import Frozen, first_error
from ppcl_rt.planning.milliseconds import Times
from ppcl_rt.planning.plan import Plan

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)
# Units that people write, lower case; GB = 1e9 bytes.
_UNITS: dict[str, dict[str, float]] = {
    "params": {"": 1, "k": 1e3, "m": 1e6, "b": 1e9},
    "flops": {"": 1, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "mflops": 1e6, "gflops": 1e9, "tflops": 1e12},
    "memory": {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12},
    "latency": {"": 1, "ms": 1, "s": 1e3},
}
_UNITS["fit"] = _UNITS["memory"]
_EXAMPLES = {"params": "10B", "flops": "40T", "memory": "12GB", "latency": "400ms", "fit": "24GB"}
# What each budget limits; the others say how.
_LIMITED = ("ratio", "params", "flops", "memory", "latency", "fit")


class Limit(NamedTuple):
    """The most that a plan may cost in one currency."""

    cost: Cost
    most: float


class Budget(Frozen):
    """The most that a plan may cost; several together hold all at once.

    Amounts are numbers, or text with a unit: ``"12GB"`` (GB is 1e9 bytes), ``"10B"`` parameters, ``"40T"`` FLOPs.

    Attributes:
        ratio: in (0, 1]: at most this share of the dense parameters and of the dense FLOPs at the catalog's reference
            shape; 1 is the dense model.
        params: parameters.
        flops: floating-point operations of a forward at ``shape``.
        memory: bytes of the weights that the model holds, in its dtype or quantised.
        latency: milliseconds of a forward at ``shape``, as measured on this device.
        fit: bytes of a device that the whole pipeline runs on; the model gets what the rest leaves
            (`ppcl_rt.model.fitting`).
        shape: tokens of a forward; None for the reference shape.
        pipeline: the rest, for ``fit``: the folder of a diffusers pipeline, or a pipeline.
        offload: how it runs, for ``fit``: None where all parts stay on the device, ``"model"`` where one part at a time
            is there (``enable_model_cpu_offload``).
    """

    ratio: float | None = Field(None, gt=0, le=1)
    params: float | None = Field(None, gt=0, allow_inf_nan=False)
    flops: float | None = Field(None, gt=0, allow_inf_nan=False)
    memory: float | None = Field(None, gt=0, allow_inf_nan=False)
    latency: float | None = Field(None, gt=0, allow_inf_nan=False)
    fit: float | None = Field(None, gt=0, allow_inf_nan=False)
    shape: Tokens | None = None
    pipeline: Any = None
    offload: Literal["model"] | None = None

    @classmethod
    def of(cls, ratio: float | None = None, **budgets: Any) -> Budget:
        """Build a budget.

        Raises:
            ValueError: no such budget, or not an amount; one line says what was wanted.
        """
        if unknown := set(budgets) - set(cls.model_fields):
            raise ValueError(f"there is no budget {min(unknown)}: wanted {', '.join(cls.model_fields)}")
        if ratio is not None:
            ratio = check_ratio(ratio)
        try:
            return cls(ratio=ratio, **budgets)
        except ValidationError as error:
            raise ValueError(first_error(error, "a budget")) from None

    @field_validator("params", "flops", "memory", "latency", "fit", mode="before")
    @classmethod
    def _amount(cls, given: Any, info: ValidationInfo) -> Any:
        """Read ``"12GB"``; numbers are taken as they are."""
        if given is None or (isinstance(given, (int, float)) and not isinstance(given, bool)):
            return given
        name = str(info.field_name)
        match = _AMOUNT.fullmatch(given) if isinstance(given, str) else None
        unit = _UNITS[name].get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(f"wanted an amount such as {_EXAMPLES[name]}, not {given!r}")
        return float(match[1]) * unit

    @field_validator("shape", mode="before")
    @classmethod
    def _tokens(cls, shape: Any) -> Any:
        """Read ``"4096+512"`` or ``"4096+512x2"``: image tokens, text tokens, batch."""
        if isinstance(shape, str):
            match = re.fullmatch(r"(\d+)\+(\d+)(?:x(\d+))?", shape.strip())
            if match is None:
                raise ValueError(f"wanted image + text tokens (x batch), such as 4096+512 or 4096+512x2, not {shape!r}")
            return Tokens(int(match[1]), int(match[2]), int(match[3] or 1))
        return shape

    @field_validator("shape")
    @classmethod
    def _some_tokens(cls, shape: Tokens | None) -> Tokens | None:
        if shape is not None and not all(1 <= n <= MOST_TOKENS for n in shape):
            raise ValueError(f"a shape has 1 to {MOST_TOKENS} tokens of each stream and a batch of 1 or more")
        return shape

    @field_validator("offload", mode="before")
    @classmethod
    def _offload(cls, offload: Any) -> Any:
        if offload not in (None, "model"):
            raise ValueError(
                f'wanted "model" (enable_model_cpu_offload) or None, not {offload!r}: where layers come one by one, '
                "the size of the transformer does not decide what fits"
            )
        return offload

    @model_validator(mode="after")
    def _something(self) -> Budget:
        if all(getattr(self, name) is None for name in _LIMITED):
            raise ValueError("give a ratio, or at least one of params, flops, memory, latency and fit")
        if self.fit is None and (self.pipeline is not None or self.offload is not None):
            raise ValueError("pipeline and offload go with fit, the memory of the device")
        return self

    @field_serializer("pipeline")
    def _named(self, pipeline: Any) -> str | None:
        return None if pipeline is None else _short(pipeline)

    def __str__(self) -> str:
        given = self.model_dump(exclude_none=True)
        return ", ".join(f"{name} {_short(value)}" for name, value in given.items())

    @property
    def only_ratio(self) -> bool:
        """Whether a ratio is all that is asked for."""
        return self.ratio is not None and self == Budget(ratio=self.ratio)

    def limits(
        self, catalog: Catalog, weights: Callable[[], Bytes], times: Callable[[Tokens], Times]
    ) -> tuple[Limit, ...]:
        """What it means for a catalog.

        Args:
            weights: returns how bytes are counted; called if memory is asked for.
            times: returns the milliseconds at a shape; called if latency is asked for.
        """
        assert self.fit is None, "what fits is found first: it is a limit of memory then"
        shape = self.shape or catalog.reference
        found: list[Limit] = []
        if self.ratio is not None:
            found += ratio_limits(catalog, self.ratio)
        if self.params is not None:
            found.append(Limit(Params(), self.params))
        if self.flops is not None:
            found.append(Limit(Flops(shape), self.flops))
        if self.memory is not None:
            found.append(Limit(weights(), self.memory))
        if self.latency is not None:
            found.append(Limit(Milliseconds(times(shape)), self.latency))
        return tuple(found)


def ratio_limits(catalog: Catalog, ratio: float) -> tuple[Limit, Limit]:
    """What a ratio allows: that share of the dense parameters, and of the dense FLOPs at the reference shape."""
    architecture, reference = catalog.architecture, catalog.reference
    return (
        Limit(Params(), ratio * architecture.dense_params),
        Limit(Flops(reference), ratio * architecture.dense_flops(reference)),
    )


def costs(
    catalog: Catalog, plan: Plan, weights: Bytes, shape: Tokens | None = None, times: Times | None = None
) -> dict[str, float]:
    """What a plan costs in each currency.

    Args:
        weights: how bytes are counted.
        shape: of the FLOPs; None for the catalog's reference shape.
        times: milliseconds at that shape; without them there is no latency.
    """
    shape = shape or catalog.reference
    each: list[Cost] = [Params(), Flops(shape), weights, *([Milliseconds(times)] if times else [])]
    return {"ratio": catalog.ratio(plan)} | {cost.currency: cost.of(catalog.architecture, plan) for cost in each}


def check_ratio(ratio: float) -> float:
    """Return the ratio as a float.

    Raises:
        ValueError: not a number in (0, 1].
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(
            f"a ratio is a number above 0 and up to 1 (share of the dense parameters and FLOPs), not {ratio!r}"
        )
    return float(ratio)


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        image, text, batch = value
        return f"{image}+{text}" + (f"x{batch}" if batch != 1 else "")
    if isinstance(value, (int, float)):
        return f"{value:,.10g}"
    return str(value) if isinstance(value, (str, Path)) else type(value).__name__
