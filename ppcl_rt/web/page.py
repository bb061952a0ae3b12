"""The page of a studio: what it shows, and what its buttons do. Nothing on it comes from another machine.

It is served before its studio is open: a browser loads it while torch and the checkpoint are read.
"""

from __future__ import annotations

import hashlib
import html
import logging
import math
import os
import socket
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gradio as gr

from ppcl_rt.messages import brief
from ppcl_rt.web.asking import Ask

if TYPE_CHECKING:
    from ppcl_rt.pipelines.drawing import OnStep
    from ppcl_rt.web.studio import Drawn, Studio

_log = logging.getLogger(__name__)
# People whose pictures are drawn at once; others wait.
AT_ONCE = 4
# Files and seconds for which what was shown stays on disk.
_KEPT_FILES, _KEPT_SECONDS = 200, 3600
# Seconds between two reports of the steps that are done.
_BETWEEN_REPORTS = 0.3
# What the reader of a page may see: anything else that goes wrong is logged in full on this machine.
_THEIRS = (ValueError, OSError, CancelledError)
# Small pictures are enlarged pixel by pixel.
_CSS = ".pixels img {image-rendering: pixelated} .costs table {width: 100%} .costs td, .costs th {text-align: right}"
# No names of fonts that would be looked up elsewhere.
_THEME = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


class Page:
    """The page of a studio.

    Args:
        studio: to come; whoever asks for a picture before waits for it.
        checkpoint: what is opened, for people.
        ratio: what the slider shows at first.
    """

    def __init__(self, studio: Future[Studio], checkpoint: str, ratio: float) -> None:
        self._coming = studio
        self._folder = tempfile.TemporaryDirectory(prefix="ppcl-web-")
        self._files: OrderedDict[Path, None] = OrderedDict()
        # Gradio's own telemetry.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        self.blocks = self._laid_out(checkpoint, ratio)

    def serve(self, host: str, port: int) -> str:
        """Serve the page until `close`, at a free port for 0; returns its address.

        Raises:
            ValueError: the port is in use, or the host is not this machine's.
        """
        if port:
            _check_port(host, port)
        _, address, _ = self.blocks.queue(default_concurrency_limit=AT_ONCE).launch(
            server_name=host,
            server_port=port or _free_port(host),
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            # Links of gradio's.
            footer_links=[],
            max_file_size="1mb",
            allowed_paths=[self._folder.name],
            theme=_THEME,
            css=_CSS,
        )
        return address

    def close(self) -> None:
        """Stop serving, and delete what was shown."""
        self.blocks.close(verbose=False)
        self._folder.cleanup()

    def _laid_out(self, checkpoint: str, ratio: float) -> gr.Blocks:
        with gr.Blocks(title="ppcl web", analytics_enabled=False, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)) as page:
            title = gr.Markdown(f"### Opening {html.escape(checkpoint)} ...", elem_id="title")
            with gr.Row():
                prompt = gr.Textbox("", label="Prompt", scale=4, elem_id="prompt")
                seed = gr.Textbox("0", label="Seed", elem_id="seed")
                steps = gr.Textbox("", label="Steps", elem_id="steps")
            with gr.Row():
                slider = gr.Slider(
                    0.01, 1, ratio, step=0.01, label="Ratio", scale=3, elem_id="slider", interactive=False
                )
                typed = gr.Textbox(f"{ratio:g}", label="Ratio, typed", elem_id="ratio")
                memory = gr.Textbox("", label="Memory, at most", placeholder="6MB, 12GB", elem_id="memory")
                latency = gr.Textbox("", label="ms, at most", placeholder="400", elem_id="latency")
                button = gr.Button("Draw", variant="primary", elem_id="draw", interactive=False)
            with gr.Row(elem_classes="pixels"):
                dense = gr.Image(label="Dense", interactive=False, elem_id="dense", buttons=[])
                drawn = gr.Image(label="Within the budget", interactive=False, elem_id="drawn", buttons=[])
            notes = gr.Markdown("", elem_id="notes")
            costs = gr.HTML("", elem_id="costs", elem_classes="costs")
            download = gr.DownloadButton("Download PNG", interactive=False, elem_id="download")
            plan = gr.Image(
                label="What the plan keeps", show_label=False, interactive=False, elem_id="plan", buttons=[]
            )
            several = gr.Button("Draw the prompt at six ratios", elem_id="several", interactive=False)
            strip = gr.Image(label="Six ratios", show_label=False, interactive=False, elem_id="strip", buttons=[])
            sheet = gr.DownloadButton("Download the six", interactive=False, elem_id="sheet")

            fields = [prompt, seed, steps, typed, memory, latency]
            shown: dict[str, Any] = {
                "outputs": [drawn, dense, notes, costs, download, plan],
                "concurrency_limit": AT_ONCE,
                "show_progress_on": [drawn],
            }
            # First, for the name: those that come later get others.
            button.click(self.draw, fields, api_name="draw", **shown)
            # The slider says what is typed; a number that was typed moves it. Each is set by the page, in the browser.
            said = "value => String(value)"
            slider.input(None, slider, typed, js=said)
            moved = slider.release(None, slider, typed, js=said)
            moved.then(self.draw, fields, trigger_mode="always_last", api_visibility="private", **shown)
            typed.input(None, [typed, slider], slider, js="(text, now) => Number(text) > 0 ? Number(text) : now")
            # Without gradio's animation, which takes time from the opening where there are few cores.
            waiting: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            opened = page.load(self._open, None, [title, steps, slider, button, several], **waiting)
            # What somebody typed meanwhile stays.
            prompted = opened.success(self._prompt, prompt, prompt, queue=False, **waiting)
            prompted.success(self.draw, fields, api_visibility="private", **shown)
            for field in fields:
                field.submit(self.draw, fields, api_visibility="private", **shown)
            row: dict[str, Any] = {"concurrency_limit": AT_ONCE, "show_progress_on": [strip]}
            several.click(self.strip, fields, [strip, sheet], api_name="strip", **row)
        return page

    def _open(self) -> tuple[Any, ...]:
        """Wait for the studio; returns its title, its steps and least ratio, and what can be asked for from then on."""
        try:
            studio = self._coming.result()
        except Exception as error:
            _refuse(error)
        usual = str(studio.task.usual.steps or "as the pipeline")
        # A checkpoint may have its dense plan alone; a slider needs two ends.
        least = min(math.ceil(studio.smallest * 100) / 100, 0.99)
        return (
            f"### {html.escape(studio.title)}",
            gr.Textbox(placeholder=usual),
            gr.Slider(minimum=least, interactive=True),
            gr.Button(interactive=True),
            gr.Button(interactive=True),
        )

    def _prompt(self, typed: str) -> str:
        """A prompt to begin with, where nobody has typed one."""
        return typed or self._coming.result().task.demo_prompts[0]

    def draw(
        self,
        prompt: str,
        seed: str,
        steps: str,
        ratio: str,
        memory: str,
        latency: str,
        progress: Any = gr.Progress(),  # noqa: B008  # how gradio is asked for one
    ) -> Iterator[tuple[Any, ...]]:
        """Draw what the fields ask for, then the dense picture; yields the outputs of the page."""
        try:
            ask = Ask.read(prompt, seed, steps, ratio, memory, latency)
            studio = self._coming.result()
            drawn = studio.draw(ask, _reporting(progress, "at the ratio"))
            notes = "\n\n".join(html.escape(note) for note in studio.notes(ask.prompt))
            picture = self._file(studio.png(ask, [drawn]), f"seed{ask.seed}-ratio{drawn.cost.ratio:.3f}")
            plan = self._file(studio.plan_png(drawn.made.plan), "plan")
            download = gr.DownloadButton(value=picture, interactive=True)
            yield picture, gr.skip(), notes, _table(studio, [drawn]), download, plan
            dense = studio.dense(ask, _reporting(progress, "dense"))
            picture = self._file(studio.png(ask, [dense]), f"seed{ask.seed}-dense")
            yield gr.skip(), picture, gr.skip(), _table(studio, [dense, drawn]), gr.skip(), gr.skip()
        except Exception as error:
            _refuse(error)

    def strip(
        self,
        prompt: str,
        seed: str,
        steps: str,
        ratio: str,
        memory: str,
        latency: str,
        progress: Any = gr.Progress(),  # noqa: B008  # how gradio is asked for one
    ) -> Iterator[tuple[Any, ...]]:
        """Draw the prompt at several ratios; yields the row of them after each, and its file."""
        try:
            # The ratio and budgets of the fields say nothing here.
            ask = Ask.read(prompt, seed, steps, "1")
            studio = self._coming.result()
            for drawn in studio.strip(ask, _reporting(progress, "six ratios")):
                row = self._file(studio.png(ask, drawn), f"seed{ask.seed}-ratios")
                yield row, gr.DownloadButton(value=row, interactive=True)
        except Exception as error:
            _refuse(error)

    def _file(self, content: bytes, name: str) -> str:
        """A PNG on disk, for the browser to fetch; the oldest ones are deleted."""
        path = Path(self._folder.name) / hashlib.sha256(content).hexdigest()[:16] / f"ppcl-{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        self._files[path] = None
        self._files.move_to_end(path)
        while len(self._files) > _KEPT_FILES:
            oldest, _ = self._files.popitem(last=False)
            oldest.unlink(missing_ok=True)
        return str(path)


def _table(studio: Studio, drawn: list[Drawn]) -> str:
    device = html.escape(str(studio.model.device))
    heads = ("", "ratio", "parameters", "MFLOPs a forward", "bytes of weights", "ms a step", "ms in all")
    rows = [
        (
            html.escape(each.made.asked),
            f"{each.cost.ratio:.3f}",
            f"{each.cost.params:,}",
            f"{each.cost.flops / 1e6:,.1f}",
            f"{each.cost.memory:,}",
            f"{each.cost.step_ms:,.1f}" + ("" if each.cost.alone else " *"),
            f"{each.cost.ms:,.0f}" + ("" if each.cost.alone else " *"),
        )
        for each in drawn
    ]
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    said = f"FLOPs at the reference shape. Milliseconds of this very picture, the median step, on {device}, float32"
    if not all(each.cost.alone for each in drawn):
        said += "; * another picture was drawn at the same time"
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f"<table><tr>{head}</tr>{cells}</table><small>{said}.</small>"


def _check_port(host: str, port: int) -> None:
    with socket.socket() as tried:
        # As servers do: a port whose last connections are still closing is free.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            said = error.strerror or error
            raise ValueError(f"cannot serve at {host}, port {port}: {said}; give another --port") from None


def _free_port(host: str) -> int:
    with socket.socket() as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])


def _reporting(progress: Any, what: str) -> OnStep:
    """Show the steps that are done; not each of many a second, as that takes time from small models."""
    shown = -math.inf

    def report(done: int, of: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= _BETWEEN_REPORTS:
            shown = now
            progress((done, of), desc=what, unit="steps")

    return report


def _refuse(error: Exception) -> NoReturn:
    """Say on the page what was wrong, in one line."""
    if not isinstance(error, _THEIRS):
        _log.error("this could not be drawn", exc_info=error)
    said = brief(str(error)) or type(error).__name__
    raise gr.Error(html.escape(said), title="Not drawn", duration=None, print_exception=False) from None
