"""``ppcl emoji``: the pictures of the task emoji, and the pipeline folder that its transformer is trained for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from ppcl_rt.files import replacing_folder
from ppcl_train.config.presets import PRESETS
from ppcl_train.emoji import notice
from ppcl_train.emoji.artwork import artwork
from ppcl_train.stages import autoencoder

app = typer.Typer(help="Make the pictures and the autoencoder of the task emoji.")


@app.command()
def pictures(
    out: Annotated[Path, typer.Argument(help="folder of PNGs with metadata.jsonl")],
    singles: Annotated[
        int,
        typer.Option(min=1, help="how often to list what comes in no other gender or tone: a teacher needs it more"),
    ] = 1,
) -> None:
    """Write the pictures that are not held out, with their captions, as `ppcl train cache --images` reads them."""
    art = artwork()
    kinds = Counter(caption.role for caption in art.captions)
    with replacing_folder(out, lambda name: True) as partial:
        lines = []
        for number, (caption, picture) in enumerate(zip(art.captions, art.pictures, strict=True)):
            if not caption.held_out:
                Image.fromarray(picture).save(partial / f"{number:04d}.png")
                line = json.dumps({"file_name": f"{number:04d}.png", "text": caption.text})
                lines += [line] * (singles if kinds[caption.role] == 1 else 1)
        (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        (partial / notice.FILE).write_text(notice.TEXT)
    kept = len(art.captions) - int(art.held_out.sum())
    print(f"wrote {kept} pictures of {len(art.captions)} to {out}, {len(lines)} lines; the rest is held out")


@app.command(name="autoencoder")
def train_autoencoder(
    out: Annotated[Path, typer.Argument(help="pipeline folder; its transformer comes from a training run")],
    run: Annotated[Path, typer.Option(help="folder of the training, which goes on where it was stopped")] = Path(
        "runs/emoji-autoencoder"
    ),
    steps: Annotated[int, typer.Option(min=1)] = 5000,
) -> None:
    """Train the autoencoder; writes a pipeline folder that lacks its transformer."""
    run.mkdir(parents=True, exist_ok=True)
    preset = PRESETS["emoji"]
    autoencoder.write(preset, autoencoder.train(preset, run, steps), out)
    print(f"wrote {out}")
