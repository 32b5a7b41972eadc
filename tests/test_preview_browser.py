"""The preview's page in headless Chromium: it renders, nothing is blocked, and it fits a narrow window."""

import functools
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipeline.preview.page import POLICY, Card, write_page
from tests.test_preview import page

pytestmark = pytest.mark.slow

MAGENTA = np.full((300, 400, 3), (255, 0, 255), np.uint8)
LONG = "camera-07/" + "a_name_without_any_place_to_break_" * 8 + ".jpg"
# a page around ours, of the same origin, may look into it, which has no script of its own
MEASURE = """<!doctype html><body style="margin: 0">
<iframe src="index.html" style="border: 0; width: 360px; height: 900px"></iframe><pre></pre>
<script>addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument
  const checkbox = page.querySelector("figure input"), image = page.querySelector("figure img")
  const before = image.getBoundingClientRect().height
  checkbox.focus(); checkbox.click()
  document.querySelector("pre").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, images: [...page.images].map(image => image.naturalWidth),
    bars: page.querySelectorAll("svg rect").length, focused: page.activeElement === checkbox,
    before: before, after: image.getBoundingClientRect().height,
    ground: getComputedStyle(page.body).backgroundColor})
})</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium (Debian: apt install chromium), which is not here")
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a folder with the page and the one that measures it."""
    folder = tmp_path_factory.mktemp("served")
    cards = [Card(LONG, "worst", MAGENTA, tuple(np.linspace(0.5, 1, 40)), 39), Card("b.jpg", "random", MAGENTA),
             Card("c.jpg", "random", None, (0.5,), 0, note=LONG), Card(LONG, "corrupt", None, note=LONG, rejected=True)]
    (folder / "index.html").write_text(write_page(page(*cards, score_meaning="what it means")))
    (folder / "loads.html").write_text(f"""<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<img src="picture.png"><script>0</script>""")
    (folder / "measure.html").write_text(MEASURE)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def browse(chromium: str, address: str, profile: Path, *options: str) -> tuple[str, str]:
    """The document after it has loaded, and what the browser's console said."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
               "--dump-dom", f"--user-data-dir={profile}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def measured(chromium: str, served: str, profile: Path, *options: str) -> tuple[dict, str]:
    document, console = browse(chromium, f"{served}/measure.html", profile, *options)
    found = re.search(r"<pre>(.+?)</pre>", document)
    assert found is not None, document
    return json.loads(found[1]), console


def test_the_page_shows_its_pictures_and_fits_360_px_without_a_word_in_the_console(chromium, served, tmp_path):
    seen, console = measured(chromium, served, tmp_path)

    assert console == ""
    assert seen["width"] == 360
    assert seen["images"] == [400, 400]
    assert seen["bars"] == 2
    assert seen["ground"] == "rgb(246, 247, 249)"


def test_a_picture_is_enlarged_and_dark_is_dark(chromium, served, tmp_path):
    # Blink's own number for dark
    seen, console = measured(chromium, served, tmp_path, "--blink-settings=preferredColorScheme=0")

    assert console == ""
    assert seen["ground"] == "rgb(17, 19, 24)"
    assert seen["focused"]
    assert (seen["before"], seen["after"]) == (260, 900)


def test_the_policy_would_be_seen_to_block(chromium, served, tmp_path):
    _, console = browse(chromium, f"{served}/loads.html", tmp_path)
    assert console.count("Content Security Policy") >= 2
