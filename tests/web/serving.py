"""A page that is served to tests, and the Chromium that looks at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHECKPOINT = Path(__file__).parents[2] / "examples" / "scenes"
# Names under which systems have one; without any, the one that playwright installs.
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


@contextmanager
def served(studio: Any, ratio: float = 0.5) -> Iterator[str]:
    """Serve a page on a port that is free; yields its address.

    Args:
        studio: open already, or to come.
    """
    from ppcl_rt.web.page import Page

    if isinstance(studio, Future):
        coming = studio
    else:
        coming = Future()
        coming.set_result(studio)
    page = Page(coming, "examples/scenes", ratio)
    try:
        yield page.serve("127.0.0.1", 0)
    finally:
        page.close()


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a headless Chromium; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="there is no playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    with api.sync_playwright() as playwright:
        found = found or playwright.chromium.executable_path
        if not os.path.exists(found):
            pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
        # A sandbox needs rights that containers do not give; the page is our own.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
