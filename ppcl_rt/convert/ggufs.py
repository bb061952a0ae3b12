"""GGUF files, as stable-diffusion.cpp and ComfyUI-GGUF read and others publish them; with the package ``gguf``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppcl_rt.checkpoint.card import Origin, origin_of
from ppcl_rt.checkpoint.headers import json_object_of
from ppcl_rt.convert.formats import CONFIG_IN_FILE, Types
from ppcl_rt.files import one_line, replacing

# Where other programs look for what a file is of, and hubs for its origin.
_ARCHITECTURE, _BASE, _LICENSE = "general.architecture", "general.base_model.0.name", "general.license"
# In front of a tensor's name: the shape of one that was laid out anew so that its columns divide into blocks.
_SHAPE = "comfy.gguf.orig_shape."


def package() -> Any:
    """The package ``gguf``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError('GGUF needs the package gguf: pip install "ppcl-rt[gguf]"') from None
    return gguf


def write_gguf(
    path: Path,
    architecture: str,
    outer: Mapping[str, torch.Tensor],
    blocks: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    origin: Origin,
    types: Types,
) -> None:
    """Write a GGUF file; one that is there already is replaced once the new one is complete.

    Args:
        architecture: what readers know the family as.
        outer, blocks: tensors by their original names; those outside the blocks, and vectors, are written in F32.
        config: of diffusers' class, for those who read it back.
        types: of the matrices of the blocks; Q8_0 has a scale for 32 columns, and F16 stands in where they do not
            divide.

    Raises:
        ValueError: the package ``gguf`` is not installed, or the file cannot be written.
    """
    gguf = package()
    kinds = gguf.GGMLQuantizationType
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(CONFIG_IN_FILE, json.dumps(dict(config)))
        if origin.base_model is not None:
            writer.add_base_model_count(1)
            writer.add_string(_BASE, origin.base_model)
        if origin.license is not None:
            writer.add_string(_LICENSE, origin.license)
        for name, tensor in {**outer, **blocks}.items():
            kind = kinds[types] if name in blocks and tensor.ndim == 2 else kinds.F32
            if kind == kinds.Q8_0 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = kinds.F16
            data = gguf.quants.quantize(tensor.detach().float().cpu().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, Origin]:
    """Read a GGUF file; what is quantised becomes ``dtype``, all in memory at once.

    Returns:
        Tensors by their names in the file, the config of diffusers' class if the file has one, and its origin.

    Raises:
        ValueError: the package ``gguf`` is not installed, or the file is not whole.
    """
    gguf = package()
    kinds = gguf.GGMLQuantizationType
    plain = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}
    try:
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for tensor in reader.tensors:
            shape = said.get(_SHAPE + tensor.name) or tensor.shape[::-1].tolist()
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            whole = torch.from_numpy(values.reshape(shape))
            tensors[tensor.name] = whole.to(plain.get(tensor.tensor_type, dtype))
    except Exception as error:
        # The reader trusts every number of the file.
        raise ValueError(f"{path} is no whole GGUF file ({one_line(error)}): fetch it again") from None
    config = None
    if CONFIG_IN_FILE in said:
        config = json_object_of(str(said[CONFIG_IN_FILE]), f"{path}: its {CONFIG_IN_FILE}")
    return tensors, config, origin_of({"base_model": said.get(_BASE), "license": said.get(_LICENSE)})
