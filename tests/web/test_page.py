"""The page as it is served: in a browser where there is one, and by its own client."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="there is no gradio: pip install 'ppcl-rt[web]'")

from gradio_client import Client
from gradio_client.exceptions import AppError
from serving import CHECKPOINT, chromium, served

from ppcl_rt.cli import web
from ppcl_rt.web.asking import Ask
from ppcl_rt.web.studio import Studio

# Milliseconds: the machine of tests may do other things too.
PATIENCE = 90_000
# What `draw` and `strip` take: prompt, seed, steps, ratio, memory, latency.
USUAL = ("a red ring", "0", "2", "0.5", "", "")


def fields(**changed):
    return tuple({**dict(zip(("prompt", "seed", "steps", "ratio", "memory", "latency"), USUAL)), **changed}.values())


@pytest.fixture(scope="module")
def asked_for():
    """Addresses that this process looks up or connects to, but for its own machine's, while a page is served."""
    found, connect, lookup = [], socket.socket.connect, socket.getaddrinfo

    def watched_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            found.append(address)
        return connect(self, address)

    def watched_lookup(host, *more, **given):
        if host not in (None, "127.0.0.1", "::1", "localhost", b"127.0.0.1", b"localhost"):
            found.append(host)
        return lookup(host, *more, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched_connect)
        patch.setattr(socket, "getaddrinfo", watched_lookup)
        yield found


@pytest.fixture(scope="module")
def studio(asked_for):
    return Studio.open(str(CHECKPOINT))


@pytest.fixture(scope="module")
def address(studio, asked_for):
    with served(studio) as found:
        yield found


@pytest.fixture(scope="module")
def client(address, asked_for, tmp_path_factory):
    return client_of(address, asked_for, tmp_path_factory.mktemp("client"))


def client_of(address, asked_for, folder):
    """A client of gradio's. What it asks of a hub as it begins, for its own headers, is not the page's."""
    before = len(asked_for)
    found = Client(address, verbose=False, download_files=folder, analytics_enabled=False)
    del asked_for[before:]
    return found


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def tab(browser, address):
    """A new page of the browser, with the studio's page drawn, and the hosts that it asked."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    hosts = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(address)
    page.wait_for_selector("#dense img")
    yield page, hosts
    page.close()


def source(page, name):
    return page.get_attribute(f"{name} img", "src")


def wait_for_another(page, name, before):
    page.wait_for_function(
        "([name, before]) => { const at = document.querySelector(name + ' img'); return at && at.src != before }",
        arg=[name, before],
    )
    return source(page, name)


def test_dragging_the_slider_draws_another_picture(tab):
    page, _ = tab
    drawn, dense, plan = source(page, "#drawn"), source(page, "#dense"), source(page, "#plan")
    handle = page.locator("#slider input[type=range]").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(handle["x"] + 0.1 * handle["width"], middle, steps=5)
    page.mouse.up()
    assert wait_for_another(page, "#drawn", drawn) != drawn
    assert wait_for_another(page, "#plan", plan) != plan and source(page, "#dense") == dense
    ratio = float(page.input_value("#ratio input, #ratio textarea"))
    assert ratio < 0.3 and f"ratio {ratio:g}" in page.inner_text("#costs")


def test_half_gets_a_message_and_the_page_goes_on(tab):
    page, _ = tab
    drawn = source(page, "#drawn")
    field = page.locator("#ratio input, #ratio textarea")
    field.fill("half")
    field.press("Enter")
    toast = page.wait_for_selector(".toast-body.error")
    assert 'a ratio is a number above 0 and up to 1, not "half"' in toast.inner_text()
    assert "Traceback" not in page.content()
    field.fill("0.2")
    field.press("Enter")
    assert wait_for_another(page, "#drawn", drawn) != drawn


def test_the_strip_can_be_downloaded(tab):
    page, _ = tab
    page.click("#several")
    # Each ratio makes the row longer; all six are there when the button is.
    page.wait_for_selector("#strip img")
    page.wait_for_function("document.querySelector('#strip img').naturalWidth > 1150")
    with page.expect_download() as download:
        page.click("#sheet")
    with Image.open(download.value.path()) as sheet:
        assert sheet.text["prompt"] == "a red square at b2" and sheet.text["ratio"].count(",") == 5


def test_nothing_is_asked_of_another_machine(tab, asked_for):
    page, hosts = tab
    assert hosts == {"127.0.0.1"} and not asked_for
    # Fonts that are named in style sheets are only asked for where a letter needs them.
    assert page.evaluate("getComputedStyle(document.querySelector('#draw')).fontFamily").startswith("system-ui")


def test_the_page_names_no_other_host_that_a_browser_would_ask(address):
    """Without a browser: nothing in the page or its style sheets is loaded from elsewhere; links may lead away."""
    page = urlopen(address).read().decode()
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(https?:)?//", page)
    assert not loaded and "gradio_config" in page
    for sheet in re.findall(r"href=[\"']([^\"']+\.css[^\"']*)", page):
        style = urlopen(f"{address.rstrip('/')}/{sheet.lstrip('./')}").read().decode()
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style), sheet


def test_a_picture_and_its_metadata_are_downloaded(client, studio, asked_for):
    job = client.submit(*fields(), api_name="/draw")
    job.result()
    picture, _, notes, costs, download, plan = (part for part in job.outputs()[0])
    path = download["value"] if isinstance(download, dict) else download
    ask = Ask.read(*fields())
    content = studio.png(ask, [studio.draw(ask)])
    with Image.open(path) as file, Image.open(io.BytesIO(content)) as wanted:
        assert file.text == wanted.text and file.tobytes() == wanted.tobytes()
    assert "ratio 0.5" in costs and notes == "" and picture and plan
    assert not asked_for


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": ""}, "say what to draw"),
        ({"prompt": "x" * 10_000}, "at most 8,000 characters"),
        ({"prompt": "two red dogs"}, "dogs"),
        ({"prompt": "<img src=x onerror=alert(1)>"}, "&lt;img"),
        ({"seed": str(2**63)}, "a seed is a whole number"),
        ({"ratio": "half"}, "above 0 and up to 1"),
        ({"memory": "1kB", "ratio": ""}, "the least is"),
    ],
)
def test_bad_input_gets_one_line_and_the_page_goes_on(client, changed, said):
    for name in ("/draw",) if {"ratio", "memory"} & set(changed) else ("/draw", "/strip"):
        with pytest.raises(AppError) as refused:
            client.predict(*fields(**changed), api_name=name)
        assert said in str(refused.value) and "Traceback" not in str(refused.value)
    assert client.predict(*fields(), api_name="/draw")


def test_a_folder_that_is_deleted_gets_one_line_and_the_page_goes_on(asked_for, tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "scenes")
    with served(Studio.open(str(folder), ratio=0.2), 0.2) as address:
        client = client_of(address, asked_for, tmp_path)
        client.predict(*fields(ratio="0.2"), api_name="/draw")
        shutil.rmtree(folder)
        with pytest.raises(AppError, match="scenes"):
            client.predict(*fields(ratio="0.93"), api_name="/draw")
        assert client.predict(*fields(ratio="0.2"), api_name="/draw")


@pytest.mark.parametrize("typed", ["", "a red ring"])
def test_the_page_is_there_before_its_studio(browser, studio, typed):
    coming = Future()
    with served(coming) as address:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_selector("#title:has-text('Opening examples/scenes')")
        prompt = page.locator("#prompt textarea, #prompt input")
        assert prompt.input_value() == "" and not page.query_selector("#drawn img")
        assert page.is_disabled("#draw") and page.is_disabled("#slider input[type=range]")
        if typed:
            prompt.fill(typed)
        coming.set_result(studio)
        page.wait_for_selector("#dense img")
        assert studio.title in page.inner_text("#title") and page.query_selector("#drawn img")
        assert prompt.input_value() == (typed or studio.task.demo_prompts[0]) and page.is_enabled("#draw")
        least = float(page.get_attribute("#slider input[type=range]", "min"))
        assert studio.smallest <= least < studio.smallest + 0.01
        page.close()


def test_who_waits_for_a_studio_that_does_not_open_is_told(asked_for, tmp_path):
    coming = Future()
    with served(coming) as address:
        job = client_of(address, asked_for, tmp_path).submit(*fields(), api_name="/draw")
        coming.set_exception(ValueError("nothing opens here"))
        with pytest.raises(AppError, match="nothing opens here"):
            job.result(60)


def test_what_nobody_foresaw_gets_one_line_too(client, studio, monkeypatch):
    monkeypatch.setattr(studio.task, "sample", lambda *given: 1 / 0)
    with pytest.raises(AppError, match="division by zero"):
        client.predict(*fields(seed="77"), api_name="/draw")


def test_two_people_draw_at_the_same_time(client, studio, monkeypatch):
    """Each waits in the middle of a picture for the other: it ends only where both are drawn at once."""
    both, sample = threading.Barrier(2, timeout=60), studio.task.sample

    def meet(model, prompts, seed, how, on_step):
        both.wait()
        ratio = model.catalog.ratio(model.plan)
        picture = sample(model, prompts, seed, how, on_step)
        both.wait()
        assert model.catalog.ratio(model.plan) == ratio
        return picture

    monkeypatch.setattr(studio, "dense", lambda ask, on_step: studio.draw(Ask.read(*USUAL)))
    studio.draw(Ask.read(*USUAL))
    monkeypatch.setattr(studio.task, "sample", meet)
    with ThreadPoolExecutor(2) as people:
        asks = [people.submit(client.predict, *fields(seed="78", ratio=r), api_name="/draw") for r in ("0.9", "0.2")]
        assert all(each.result() for each in asks)


def test_a_port_in_use_is_refused_in_one_line(ppcl, address):
    status, _, err = ppcl("web", CHECKPOINT, "--port", urlsplit(address).port)
    assert status == 2 and "give another --port" in err and err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("nowhere",), "nowhere"),
        ((CHECKPOINT, "--device", "cuda:99"), "there is no device cuda:99"),
        ((CHECKPOINT, "--ratio", "0.001"), "0.001"),
        ((CHECKPOINT, "--transformer", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_opened_ends_the_page_in_one_line(ppcl, given, said):
    status, _, err = ppcl("web", *given, "--port", 0)
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith("ppcl: ") and said in line and "Traceback" not in err


def test_a_browser_that_waits_is_told_what_was_wrong(browser, monkeypatch):
    """The program ends with it; the page says why."""
    error = pytest.importorskip("playwright.sync_api").Error
    waiting = threading.Event()

    def fails(*given):
        assert waiting.wait(90)
        raise ValueError("this checkpoint is damaged")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(web, "_opened", fails)
    with ThreadPoolExecutor(1) as program:
        run = program.submit(web.web, "somewhere", port=port, ratio=0.5, host="127.0.0.1")
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        for _ in range(100):
            with contextlib.suppress(error):
                page.goto(f"http://127.0.0.1:{port}")
                break
            time.sleep(0.2)
        page.wait_for_selector("#title:has-text('Opening somewhere')")
        time.sleep(1)
        waiting.set()
        assert "this checkpoint is damaged" in page.wait_for_selector(".toast-body.error").inner_text()
        with pytest.raises(ValueError, match="damaged"):
            run.result(60)
        page.close()
