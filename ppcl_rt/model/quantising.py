"""What people ask for as ``quantization_config``, and what a device can do of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ppcl_rt.ops.quantised import QuantisedLinear
from ppcl_rt.planning.quantisation import Format, Quantisation

# The configs of torchao whose arithmetic is ours, by their class.
_TORCHAO: dict[str, Format] = {
    "Int8WeightOnlyConfig": "int8",
    "Float8WeightOnlyConfig": "float8",
    "Float8DynamicActivationFloat8WeightConfig": "float8-dynamic",
}
# A GPU multiplies in float8, and compiled code reads it, from this compute capability on.
_FLOAT8_CAPABILITY = (8, 9)
_ALTERNATIVE = 'take quantize="int8" or "float8" here, which cut weights to the plan first'


def understood(config: Any) -> Quantisation | None:
    """What a ``quantization_config`` asks for: as ``quantize`` takes it, or a config of diffusers or torchao.

    Raises:
        ValueError: this is of a library whose layers cannot be cut and grown; one line says what to take.
    """
    if isinstance(config, (str, Quantisation)):
        return Quantisation.of(config)
    name = type(config).__name__
    if name == "TorchAoConfig":
        found = understood(config.quant_type)
        assert found is not None, "of a config of torchao"
        kept = tuple(getattr(config, "modules_to_not_convert", None) or ())
        return found.model_copy(update={"keep": kept}) if kept else found
    if name in _TORCHAO:
        return Quantisation(format=_TORCHAO[name])
    method = getattr(config, "quant_method", None)
    said = f"{name} ({getattr(method, 'value', method)})" if method else name
    raise ValueError(f"quantization_config {said} cannot be had at every ratio: {_ALTERNATIVE}")


def check_device(quantisation: Quantisation, device: torch.device) -> None:
    """Refuse float8 where a GPU has none.

    Raises:
        ValueError: one line says what to take.
    """
    if quantisation.format == "int8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _FLOAT8_CAPABILITY:
        raise ValueError(
            f"{quantisation.format} wants a GPU of compute capability 8.9 or above, this one has "
            f'{capability[0]}.{capability[1]}: take quantize="int8", which holds as many bytes'
        )


def quantised_names(model: nn.Module) -> set[str]:
    """Names, as without adapters, of the tensors in a state dict that make up quantised weights."""
    paths = (path for path, module in model.named_modules() if isinstance(module, QuantisedLinear))
    return {f"{path}.{name}".replace(".base_layer.", ".") for path in paths for name in ("weight", "scale")}
