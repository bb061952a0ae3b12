"""Parts of tiny random pipelines, made without a network: tokenizers, text encoders, a VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

# One token a byte and no merges: all that a tokenizer needs in order to read any prompt.
LETTERS = sorted(ByteLevel.alphabet())
_WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
# Settings of a text model that go with `clip_tokenizer`.
CLIP_WORDS = {"vocab_size": len(_WORDS), "eos_token_id": len(_WORDS) - 1, "bos_token_id": len(_WORDS) - 2}


def write_words(folder: Path, words: list[str]) -> tuple[str, str]:
    """Write the files of a tokenizer without merges."""
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def clip_tokenizer(folder: Path, most: int) -> CLIPTokenizer:
    """Of prompts of ``most`` tokens; its files lie in ``folder``."""
    return CLIPTokenizer(*write_words(folder, _WORDS), model_max_length=most)


def t5(width: int) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """A tokenizer and an encoder whose embeddings have ``width`` channels."""
    of_bytes = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, **{c: n for n, c in enumerate(LETTERS, 2)}}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=of_bytes, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )
    config = T5Config(vocab_size=300, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def vae(channels: int = 4, **changes: Any) -> AutoencoderKL:
    """One latent for 2 x 2 pixels."""
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4),
        "norm_num_groups": 2,
        "latent_channels": channels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1,
        "scaling_factor": 0.4,
    }
    return AutoencoderKL(**{**settings, **changes}).eval()
