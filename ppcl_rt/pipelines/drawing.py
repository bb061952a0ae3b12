"""A diffusers pipeline folder that draws with a transformer of ours, at any ratio."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

from ppcl_rt.files import one_line
from ppcl_rt.pipelines import words

INDEX = "model_index.json"
# What `from_pretrained` calls the dtype of weights; diffusers warns of the former name from 0.42 on.
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
# Prompts of one call where words have embeddings of their own: such pipelines are small.
_AT_ONCE = 64
# What turns prompts into embeddings; a table of words takes their place.
_TEXT = ("text_encoder", "tokenizer")


# Called with the number of denoising steps that are done, and of all of them.
OnStep = Callable[[int, int], None]


def no_report(done: int, of: int) -> None:
    """Report no steps."""


class How(NamedTuple):
    """How to sample; None for the checkpoint's own way.

    Attributes:
        steps: denoising steps.
        guidance: by the negative prompt, or as the pipeline has it; 1 for none.
        size: width and height in pixels.
    """

    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None

    def over(self, usual: How) -> How:
        """This, and what it leaves open as ``usual``."""
        return self._replace(**{name: value for name, value in usual._asdict().items() if getattr(self, name) is None})


# The checkpoint's own way.
USUAL = How()


class Drawing:
    """A pipeline that draws.

    Args:
        pipe: of diffusers, with all that it needs but the text encoder where there are ``words``.
        table: embeddings of words in the place of a text encoder.
    """

    def __init__(self, pipe: Any, table: words.WordTable | None = None) -> None:
        self.pipe, self.table = pipe, table
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def open(cls, folder: Path, transformer: Any, dtype: torch.dtype, device: Any) -> Drawing:
        """Open a pipeline folder with this transformer in the place of its own; None: `around` gives it one.

        Raises:
            ValueError: it is no pipeline that diffusers can open.
        """
        try:
            index = json.loads((folder / INDEX).read_text())
            kind = getattr(diffusers, index["_class_name"])
            table = words.WordTable.read(folder) if (folder / words.FILE).is_file() else None
            own = {name: None for name in index if table is not None and name.startswith(_TEXT)}
            pipe = kind.from_pretrained(folder, transformer=transformer, **{DTYPE: dtype}, **own)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder} cannot be opened as a pipeline: {one_line(error)}") from None
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name != "transformer":
                part.to(device)
        return cls(pipe, table)

    def around(self, transformer: Any) -> Drawing:
        """The same pipeline around another transformer; weights are shared, but no state of a call is.

        The scheduler keeps one, and so do autoencoders of videos: what their convolutions saw of the frames before.
        """
        pipe = self.pipe
        if pipe.transformer is not None:
            parts = {**pipe.components, "transformer": transformer}
            if "vae" in parts:
                parts["vae"] = copy.copy(parts["vae"])
            parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
            pipe = type(pipe)(**parts)
        else:
            pipe.register_modules(transformer=transformer)
        return Drawing(pipe, self.table)

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """Say what of some prompts is not drawn, a line each; a text encoder takes everything.

        Raises:
            ValueError: a prompt is empty.
        """
        said = []
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("a prompt is empty: say what to draw")
            if self.table is not None:
                _, unknown, cut = self.table.embed(prompt)
                if unknown:
                    said.append(f"not known here, and left out: {', '.join(dict.fromkeys(unknown))}"[:200])
                if cut:
                    said.append(f"only the first {words.MOST_WORDS} words of a prompt are read")
        return said

    def draw(
        self,
        prompts: Sequence[str],
        seed: int,
        how: How = USUAL,
        *,
        negative: str = "",
        on_step: OnStep = no_report,
        as_latents: bool = False,
    ) -> list[Any]:
        """Draw a picture for every prompt; prompt ``i`` has the noise of seed ``seed + i``, whatever the ratio.

        Args:
            how: None is the pipeline's own way.
            negative: the negative prompt, where the guidance is above 1.
            on_step: called with the number of denoising steps done, and of all, over all prompts.
            as_latents: return latents before they are decoded, as the transformer takes them.

        Returns:
            N pictures, or N latents.
        """
        parameters, drawn, done = inspect.signature(self.pipe.__call__).parameters, [], 0
        # FLUX has both; its own was distilled into it.
        name = "true_cfg_scale" if parameters["guidance_scale"].default is None else "guidance_scale"
        usual = How(parameters["num_inference_steps"].default, parameters[name].default)
        steps, guidance, size = how.over(usual)
        assert steps is not None and guidance is not None, "every pipeline has its own"
        fixed: dict[str, Any] = {name: guidance, "num_inference_steps": steps}
        if size is not None:
            fixed |= {"width": size[0], "height": size[1]}
        if as_latents:
            fixed["output_type"] = "latent"
        at_once = 1 if self.table is None else _AT_ONCE
        in_all = steps * -(-len(prompts) // at_once)

        def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            done += 1
            on_step(done, in_all)
            return {}

        for start in range(0, len(prompts), at_once):
            part = list(prompts[start : start + at_once])
            generators = [torch.Generator().manual_seed((seed + start + n) % 2**63) for n in range(len(part))]
            drawn += self.pipe(
                **fixed,
                **self._text(part, negative if guidance > 1 else None),
                generator=generators,
                callback_on_step_end=report,
            ).images
        return drawn

    def _text(self, prompts: list[str], negative: str | None) -> dict[str, Any]:
        """The arguments that stand for prompts, and for a negative prompt."""
        if self.table is None:
            return {"prompt": prompts, "negative_prompt": None if negative is None else [negative] * len(prompts)}
        found: dict[str, Any] = {}
        given = (("", prompts), ("negative_", None if negative is None else [negative] * len(prompts)))
        like = next(self.pipe.transformer.parameters())
        for prefix, texts in given:
            if texts is not None:
                embeddings, mask = self.table.batch(texts)
                found[f"{prefix}prompt_embeds"] = embeddings.to(like)
                found[f"{prefix}prompt_embeds_mask"] = mask.to(like.device)
        return found


def is_pipeline(path: str | Path) -> bool:
    """Whether a path is a local folder of a whole pipeline."""
    return (Path(path) / INDEX).is_file()
