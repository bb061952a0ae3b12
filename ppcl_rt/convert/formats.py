"""The formats that a plan can be exported to."""

from typing import Literal

# ppcl: a checkpoint of one plan, any plan. authors: the layout of the method's authors. diffusers: a folder that the
# stock class loads. single-file: safetensors under the names that the model was first published with, as ComfyUI and
# stable-diffusion.cpp read it. gguf: the same names in a GGUF file.
Format = Literal["ppcl", "authors", "diffusers", "single-file", "gguf"]

# Of the matrices in the blocks of a GGUF file.
Types = Literal["F32", "F16", "BF16", "Q8_0"]

# Where the config of diffusers' class lies in the header of a single file of ours, as JSON: other programs count
# blocks and pass over it.
CONFIG_IN_FILE = "diffusers_config"
