"""Which weights of blocks are held in eight bits, and in which format. Plain data, no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from ppcl_rt.planning.architecture import Architecture
from ppcl_rt.planning.block_spec import Part
from ppcl_rt.planning.frozen import Frozen, first_error

Format = Literal["int8", "float8", "float8-dynamic"]
FORMATS: tuple[Format, ...] = ("int8", "float8", "float8-dynamic")
# Of one scale, which each row of a weight has: float32.
SCALE_BYTES = 4
# Output layers of MLPs over image tokens: others found that these lose the most.
KEPT = ("mlp_image", "mlp")


class Quantisation(Frozen):
    """How weights are held: in eight bits, with one scale for each row.

    Attributes:
        format: ``"int8"`` and ``"float8"`` (e4m3) are of the weights alone: products are made in the model's dtype.
            ``"float8-dynamic"`` rounds the inputs too, with one scale for each token, and multiplies in float8.
        keep: parts that stay in the model's dtype, by name or path inside a block (`Part`). Modulations, norms, biases
            and what is outside of blocks stay in any case.
    """

    format: Format
    keep: tuple[str, ...] = KEPT

    @classmethod
    def of(cls, given: Any) -> Quantisation | None:
        """What ``quantize=`` means: a `Quantisation`, the name of a format, or None.

        Raises:
            ValueError: there is no such format.
        """
        if given is None or isinstance(given, cls):
            return given
        try:
            return cls(**given) if isinstance(given, dict) else cls(format=given)
        except (TypeError, ValidationError) as error:
            if isinstance(given, dict) and isinstance(error, ValidationError):
                raise ValueError(first_error(error, "a quantisation")) from None
            wanted = ", ".join(f'"{name}"' for name in FORMATS)
            raise ValueError(f"quantize is one of {wanted}, or a Quantisation, not {given!r}") from None

    def takes(self, part: Part) -> bool:
        """Whether the weight of a part, and what stands in for it, is held in eight bits."""
        of_tokens = part.stream != "sample" and not part.factored
        return of_tokens and part.path not in self.keep and (not part.name or part.name not in self.keep)

    def check(self, architecture: Architecture) -> None:
        """Refuse names of parts that no block has.

        Raises:
            ValueError: one line says which parts there are.
        """
        parts = [part for spec in architecture.kinds.values() for part in spec.parts]
        known = {name for part in parts for name in (part.name, part.path) if name} | set(KEPT)
        if unknown := sorted(set(self.keep) - known):
            raise ValueError(f"no block has a part {unknown[0]} to keep: there are {', '.join(sorted(known))}")
