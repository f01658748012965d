"""A headless Chromium: pictures of a page, its measures, its print. The page itself has no script; a copy may."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"),
    *("--no-first-run", "--disable-extensions", "--disable-sync", "--disable-component-update"),
    "--disable-background-networking",
    "--disable-dev-shm-usage",
)
DARK = "--blink-settings=preferredColorScheme=0"
NARROWEST = 500  # pixels of a window: pages that are to be narrower are framed
FRAME = (
    '<!DOCTYPE html><body style="margin:0"><iframe id="f" src="{}" style="width:{}px;height:{}px;border:0"></iframe>'
)
MEASURE = """
<script>
addEventListener("load", () => {
  const root = document.documentElement, wide = [];
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    const framed = e.parentElement.closest(".scroll, svg");  // neither lets anything out
    if (box.width && box.right > innerWidth + 1 && !framed) wide.push(e.outerHTML.slice(0, 200));
  }
  const small = [...document.querySelectorAll("svg text")].filter(e => e.getBoundingClientRect().width)
    .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a);
  const found = {inner: innerWidth, width: root.scrollWidth, height: root.scrollHeight, wide,
    smallest: Math.min(...small)};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
LISTEN = """<pre id="told"></pre>
<script>addEventListener("message", e => { document.getElementById("told").textContent = e.data; })</script>
"""


def browser() -> str | None:
    """Return the path of a Chromium, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def start(*options: str, timeout: int = 120) -> str:
    """Run Chromium once, with a profile of its own, and return what it printed."""
    program = browser()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        command = [program, *QUIET, f"--user-data-dir={profile}", *options]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "HOME": profile}
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(page: Path, out: Path, width: int, height: int, *options: str) -> Path:
    """Write a PNG of the page's top `height` pixels in a window, or a frame, of that width."""
    with tempfile.TemporaryDirectory(prefix="framed-") as folder:
        if width < NARROWEST:
            (Path(folder) / "page.html").write_bytes(page.read_bytes())
            page = Path(folder) / "frame.html"
            page.write_text(FRAME.format("page.html", width, height), encoding="utf-8")
        size = f"--window-size={max(width, NARROWEST)},{height}"
        start(f"--screenshot={out}", size, *options, page.as_uri())
    return out


def measured(page: Path, width: int) -> dict[str, Any]:
    """Return how a copy of the page, with a script that looks, is laid out at that width.

    Returns:
        inner, width, height: of the window and of the whole page, CSS pixels; wide: elements that reach out of the
        window and are in no frame that scrolls; smallest: the smallest text drawn in a picture, CSS pixels.
    """
    text = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="measured-") as folder:
        (Path(folder) / "page.html").write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
        frame = Path(folder) / "frame.html"
        frame.write_text(f"{FRAME.format('page.html', width, 2000)}{LISTEN}", encoding="utf-8")
        told = start("--dump-dom", "--virtual-time-budget=5000", "--allow-file-access-from-files", frame.as_uri())
    found = re.search(r'<pre id="told">(.+?)</pre>', told, re.DOTALL)
    assert found is not None, told[-2000:]
    return dict(json.loads(html.unescape(found[1])))


def printed(page: Path, out: Path) -> Path:
    """Write the page as a PDF."""
    start(f"--print-to-pdf={out}", "--no-pdf-header-footer", page.as_uri())
    return out
