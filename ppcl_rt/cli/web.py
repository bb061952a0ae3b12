"""``ppcl web``: a page on this machine that draws at any ratio."""

from __future__ import annotations

import importlib.util
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_rt.cli.options import Checkpoint, Device, Quantize, Transformer
from ppcl_rt.cli.starting import without_collector
from ppcl_rt.planning.budget import check_ratio

if TYPE_CHECKING:
    from ppcl_rt.web.studio import Studio

# FLOPs of a forward from which on several threads draw sooner on a CPU. At 0.1 GFLOP two threads of an idle machine
# take as long as one, and six times as long beside a browser that draws: each waits for the other, busily.
_FLOPS_OF_THREADS = 1e9


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
    with without_collector():
        # An extra.
        from ppcl_rt.web.page import Page

    coming: Future[Studio] = Future()
    page = Page(coming, checkpoint, ratio)
    try:
        print(f"the page is at {page.serve(host, port)} (Ctrl-C ends it)", flush=True)
        coming.set_result(_opened(checkpoint, ratio, transformer, quantize, device))
        print(f"{checkpoint} is open", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended")
    except Exception as error:
        if not coming.done():
            coming.set_exception(error)
            # In which those who wait for it are told.
            time.sleep(0.5)
        raise
    finally:
        coming.cancel()
        page.close()


def _opened(checkpoint: str, ratio: float, transformer: str | None, quantize: str | None, device: str) -> Studio:
    """The studio; torch and diffusers are imported only now, while a browser loads the page."""
    with without_collector():
        from ppcl_rt.cli.values import check_device
        from ppcl_rt.web.studio import Studio

        check_device(device)
        studio = Studio.open(checkpoint, ratio=ratio, transformer=transformer, quantize=quantize, device=device)
    if studio.model.costs(studio.model.catalog.dense)["flops"] < _FLOPS_OF_THREADS:
        import torch

        torch.set_num_threads(1)
    return studio
