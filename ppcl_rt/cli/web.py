"""``ppcl web``: a page on this machine that draws at any ratio."""

from __future__ import annotations

import importlib.util
import threading
from typing import Annotated

import typer

from ppcl_rt.cli.options import Checkpoint, Device, Quantize, check_device
from ppcl_rt.cli.sample import Transformer
from ppcl_rt.planning.budget import check_ratio
from ppcl_rt.web.studio import Studio


def web(
    checkpoint: Checkpoint,
    ratio: Annotated[float, typer.Option(help="where the slider is at first")] = 0.5,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free")] = 7860,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in: nobody is asked for a password")] = (
        "127.0.0.1"
    ),
    transformer: Transformer = None,
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Serve a page that draws at any ratio next to the dense picture, until it is interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'ppcl-rt[web]'")
    check_ratio(ratio)
    check_device(device)
    studio = Studio.open(checkpoint, ratio=ratio, transformer=transformer, quantize=quantize, device=device)
    # Drawn while what follows is imported, which takes seconds.
    threading.Thread(target=studio.draw_first, args=[ratio], daemon=True).start()
    # An extra.
    from ppcl_rt.web.page import Page

    page = Page(studio, ratio)
    try:
        print(f"drawing at {page.serve(host, port)} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended")
    finally:
        page.close()
