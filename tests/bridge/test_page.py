"""The page for people, in a real browser: what it shows of a daemon under load, its form, and what is hostile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the bridge needs tensornext[http]")

import browser
import fake_daemon
from bridges import Bridge, running_bridge
from browser import Browser
from conftest import Daemon
from fake_daemon import FakeDaemon
from tnxctl import Client
from tnxctl.keys import tokens
from tnxctl.protocol import wire
from tnxctl.protocol.errors import Internal

pytestmark = [
    pytest.mark.skipif(bool(browser.MISSING), reason=browser.MISSING),
    pytest.mark.timeout(240),  # a browser takes ten seconds to start on a busy machine
]

TAB, ENTER, DOWN = "\ue004", "\ue007", "\ue015"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@contextmanager
def load(endpoint: str) -> Iterator[None]:
    """One request after the other, from a thread."""
    ended = threading.Event()

    def ask() -> None:
        with Client(endpoint) as tnx:
            while not ended.is_set():
                tnx.predict(np.zeros((2, 256), np.float32), model="mlp")
                ended.wait(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def later(at: int, stats: wire.StatsReport = fake_daemon.STATS) -> wire.StatsReport:
    """The nth report of a daemon that counts nothing: the same, seconds later."""
    return msgspec.structs.replace(stats, uptime_us=stats.uptime_us + 1e6 * at)


def opened(page: Browser, bridge: Bridge) -> Browser:
    """The page, once it has shown something."""
    page.open(f"http://127.0.0.1:{bridge.port}/")
    page.wait("document.querySelector('#try-inputs fieldset') && document.querySelector('.tile')")
    return page


def test_numbers_move_under_load(page: Browser, daemon: Daemon, bridge: Bridge) -> None:
    opened(page, bridge)
    assert page.text("#status") == "ready"
    with load(daemon.endpoint):
        page.wait("parseFloat(document.querySelector('.tile .number').innerText) > 1")
        row = "[...document.querySelectorAll('#traffic tbody tr')].find((row) => row.innerText.startsWith('mlp@1'))"
        page.wait(f"parseFloat({row}.cells[1].innerText) > 1 && {row}.cells[3].innerText === '2'")
        page.wait("document.querySelectorAll('#stages rect.compute').length >= 2")
        assert page.run(f"return {row}.querySelectorAll('.bar i').length") == 7
    assert "compute" in page.text("#legend")
    assert page.messages() == []


def test_the_form_gets_an_answer(page: Browser, bridge: Bridge) -> None:
    opened(page, bridge)
    page.run("document.getElementById('try-send').focus()")
    page.press(ENTER)
    page.wait("document.querySelector('#answer').innerText.includes('answered on cpu')")
    shown = page.text("#answer")
    assert "compute" in shown
    assert "Predicted" in shown
    assert page.run("return document.querySelectorAll('#answer .bar i').length") == 7
    assert page.text("#answer pre").startswith("[")
    assert page.messages() == []


def test_values_of_ones_own_are_sent(page: Browser, tmp_path: Path) -> None:
    models = (fake_daemon.DIGITS,)
    with FakeDaemon(models=models, stats=later) as fake, running_bridge(tmp_path, fake.endpoint) as bridge:
        opened(page, bridge)
        page.run("document.querySelector('input[value=\"these values\"]').click()")
        page.run("document.querySelector('textarea').value = arguments[0]", str([[1.5] * 64, [0.0] * 64]))
        page.run("document.getElementById('try-send').click()")
        page.wait("document.querySelector('#answer pre')")
        [inputs] = fake.inputs
        assert inputs["image"].tolist() == [[1.5] * 64, [0.0] * 64]
        assert page.text("#answer pre").startswith("[96, 97, 98, ")
        page.run("document.querySelector('textarea').value = '[[1, 2'")
        page.run("document.getElementById('try-send').click()")
        page.wait("document.querySelector('#answer').innerText.includes('The values of image are not JSON')")


def test_errors_come_in_words(page: Browser, tmp_path: Path) -> None:
    counts = wire.VersionStats(name="mlp", version="1", requests=3, errors={"INTERNAL": 3})
    stats = msgspec.structs.replace(fake_daemon.STATS, models=(counts,), errors={"INTERNAL": 3, "NOT_FOUND": 2})
    with FakeDaemon(stats=lambda at: later(at, stats)) as fake, running_bridge(tmp_path, fake.endpoint) as bridge:
        page.open(f"http://127.0.0.1:{bridge.port}/")
        page.wait("document.querySelectorAll('#errors tbody tr').length == 2")
        shown = page.text("#errors")
        assert "The model or the daemon failed (INTERNAL)" in shown
        assert "No such model, version or device (NOT_FOUND)" in shown


def test_what_a_daemon_says_stays_text(page: Browser, tmp_path: Path) -> None:
    spec = wire.TensorSpec(HOSTILE, "FP32", (-1, 3))
    model = wire.ModelInfo(
        name=HOSTILE,
        version="1",
        status="ready",
        default=True,
        inputs=(spec,),
        outputs=(spec,),
        notes=(HOSTILE,),
        error=HOSTILE,
        format=HOSTILE,
    )
    counts = wire.VersionStats(name=HOSTILE, version="1", errors={HOSTILE: 1})
    stats = msgspec.structs.replace(
        fake_daemon.STATS,
        status=HOSTILE,
        version=HOSTILE,
        models=(counts,),
        devices=(wire.DeviceStats(name=HOSTILE, status=HOSTILE),),
    )

    def fail(request: wire.Predict, inputs: fake_daemon.Outputs) -> fake_daemon.Outputs:
        raise Internal(HOSTILE)

    with (
        FakeDaemon(models=(model,), compute=fail, stats=lambda at: later(at, stats)) as fake,
        running_bridge(tmp_path, fake.endpoint) as bridge,
    ):
        opened(page, bridge)
        page.run("document.getElementById('try-send').click()")
        page.wait("document.querySelector('#answer').innerText")
        for part in ("#status", "#about", "#traffic", "#devices", "#errors", "#models", "#try-inputs", "#answer"):
            assert HOSTILE in page.text(part), part
        assert page.run("return document.querySelectorAll('img').length") == 0
        page.open(f"http://127.0.0.1:{bridge.port}/metrics")
        assert page.run("return document.querySelectorAll('img').length") == 0
        assert not [message for message in page.messages() if "Content Security Policy" in message]


def test_a_daemon_that_goes_and_comes_back_is_told(page: Browser, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/tnx"
    with running_bridge(tmp_path, endpoint, "--timeout", "300ms") as bridge:
        with FakeDaemon(endpoint, stats=later):
            page.open(f"http://127.0.0.1:{bridge.port}/")
            page.wait("document.querySelector('#status').innerText === 'ready'")
        page.wait("document.querySelector('#status').innerText === 'unreachable'")
        assert page.run("return document.getElementById('problem').checkVisibility()")
        page.wait("document.querySelector('#problem').innerText.includes('nobody listens')")
        with FakeDaemon(endpoint, stats=later):
            page.wait("document.querySelector('#status').innerText === 'ready'")
            assert not page.run("return document.getElementById('problem').checkVisibility()")
    page.messages()  # of the requests that failed


def test_several_daemons_are_shown_one_by_one(page: Browser, tmp_path: Path) -> None:
    numbered = [msgspec.structs.replace(fake_daemon.STATS, version=f"0.{number}.0") for number in (1, 2)]
    with (
        FakeDaemon(stats=lambda at: later(at, numbered[0])) as first,
        FakeDaemon(stats=lambda at: later(at, numbered[1])) as second,
        running_bridge(tmp_path, f"{first.endpoint},{second.endpoint}") as bridge,
    ):
        opened(page, bridge)
        assert page.run("return document.getElementById('several').checkVisibility()")
        assert "version 0.1.0" in page.text("#about")
        page.run("document.getElementById('daemon').focus()")
        page.press(DOWN)
        page.wait("document.querySelector('#about').innerText.includes('version 0.2.0')")


def test_a_token_is_asked_for(page: Browser, daemon: Daemon, tmp_path: Path) -> None:
    listed = tmp_path / "tokens.toml"
    token = tokens.add(listed, "watcher", "predict")
    with running_bridge(tmp_path, daemon.endpoint, "--tokens", str(listed)) as bridge:
        page.open(f"http://127.0.0.1:{bridge.port}/")
        page.wait("document.querySelector('#token').checkVisibility()")
        assert page.text("#status") == "needs a token"
        for given in ("wrong", token):
            page.run("document.getElementById('token-text').focus()")
            page.press(given + ENTER)
        page.wait("document.querySelector('#status').innerText === 'ready'")
        assert not page.run("return document.getElementById('token').checkVisibility()")
        page.wait("document.querySelector('#try-inputs fieldset')")
        page.run("document.getElementById('try-send').click()")
        page.wait("document.querySelector('#answer').innerText.includes('answered on cpu')")
    page.messages()  # of the requests without a token


CONTRASTS = """
const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const luminance = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
  return "rgb(255, 255, 255)";
};
const texts = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
  && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
return texts.map((element) => {
  const [low, high] = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((a, b) => a - b);
  return [(high + 0.05) / (low + 0.05), element.outerHTML.slice(0, 80)];
}).filter(([ratio]) => ratio < 4.5);
"""
"""Texts with less contrast than 4.5 to 1, which WCAG 2.2 asks for (https://www.w3.org/TR/WCAG22/#contrast-minimum)."""

NAMELESS = """
const controls = [...document.querySelectorAll("input, select, textarea, button, svg, .bar")];
return controls.filter((one) => !(one.labels?.length || one.getAttribute("aria-label") || one.innerText))
  .map((one) => one.outerHTML.slice(0, 80));
"""


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_everybody_can_read_it(page: Browser, bridge: Bridge, path: str) -> None:
    if path == "/":
        opened(page, bridge)
        page.run("document.getElementById('try-send').click()")
        page.wait("document.querySelector('#answer pre')")
    else:
        page.open(f"http://127.0.0.1:{bridge.port}{path}")
    for width, dark in ((1200, False), (360, True)):
        page.look(width, 800, dark=dark)
        assert page.run(CONTRASTS) == []
        assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run(NAMELESS) == []
    assert page.run("return document.querySelectorAll('h1').length") == 1


def test_nothing_comes_from_elsewhere(page: Browser, bridge: Bridge) -> None:
    opened(page, bridge)
    page.press(TAB)
    assert page.run("return document.activeElement.innerText") == "Skip to the form"
    names = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(names) > 4
    assert all(name.startswith(f"http://127.0.0.1:{bridge.port}/") for name in names)


def test_a_script_from_elsewhere_would_not_run(page: Browser, bridge: Bridge) -> None:
    opened(page, bridge)
    page.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", "<img src=x onerror='document.title = 1'>")
    script = "const made = document.createElement('script'); made.text = arguments[0]; document.body.append(made)"
    page.run(script, "document.body.id = 1")
    assert page.run("return document.body.id") == ""
    assert any("Content Security Policy" in message for message in page.messages())
