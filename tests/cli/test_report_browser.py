"""The report of a real run, and of one whose file was damaged, in a real browser; its pictures are kept to be seen.

They lie in $TEST_ARTIFACTS/report, or test-artifacts/report beside the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

NO_BROWSER = f"no browser on PATH: looked for {', '.join(chromium.NAMES)}"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(chromium.browser() is None, reason=NO_BROWSER)]
PHONE, DESKTOP = 390, 1280
MARGIN = 12  # pixels of page on either side, on a phone
SMALLEST = 10.0  # pixels, of a text in a picture


@pytest.fixture(scope="module")
def kept() -> Path:
    folder = Path(os.environ.get("TEST_ARTIFACTS") or Path(__file__).parents[2] / "test-artifacts") / "report"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory, cli: Any, kept: Path) -> dict[str, Path]:
    """The report of the finished run, and that of a copy in whose ONNX file one layer's scales were doubled."""
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(finished, folder)
    path = folder / "runs" / "tiny" / "export" / "model.onnx"
    model = onnx.load(path)
    scale = next(t for t in model.graph.initializer if t.name.startswith("6.weight") and "scale" in t.name)
    scale.CopyFrom(numpy_helper.from_array(np.float32(2) * numpy_helper.to_array(scale), scale.name))
    onnx.save(model, path)
    done = cli("verify", "runs/tiny", "--target", "a100", cwd=folder)
    assert done.returncode == 1, done.stderr
    found = {}
    for name, run in (("pass", finished), ("fail", folder)):
        found[name] = kept / f"{name}.html"
        shutil.copy(run / "runs" / "tiny" / "report.html", found[name])
    return found


def corner(picture: Path) -> tuple[int, ...]:
    with Image.open(picture) as image:
        return tuple(image.convert("RGB").getpixel((2, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pass", "fail"])
def test_on_a_phone_nothing_reaches_over_the_edge(pages: dict[str, Path], kept: Path, name: str) -> None:
    found = chromium.measured(pages[name], PHONE)
    assert found["inner"] == found["width"] == PHONE and found["wide"] == []
    assert found["smallest"] >= SMALLEST
    picture = chromium.picture(pages[name], kept / f"{name}-phone.png", PHONE, found["height"])
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))[: found["height"], :PHONE]
    page = pixels[2, 2]
    assert (page == 255).all()
    for side in (pixels[:, :MARGIN], pixels[:, -MARGIN:]):  # what is cut off would reach into the margin
        assert (side == page).all()
    assert (pixels[:, MARGIN:-MARGIN] != page).any(axis=(1, 2)).mean() > 0.3  # and there is a page between


def test_on_a_desktop_in_light_and_dark(pages: dict[str, Path], kept: Path) -> None:
    light = chromium.picture(pages["pass"], kept / "pass-desktop.png", DESKTOP, 2400)
    dark = chromium.picture(pages["fail"], kept / "fail-dark.png", DESKTOP, 2400, chromium.DARK)
    assert corner(light) == (255, 255, 255) and corner(dark) == (0x13, 0x17, 0x1C)
    with Image.open(dark) as image:
        pixels = np.asarray(image.convert("L"))
    assert (pixels > 200).mean() < 0.1 < (pixels < 60).mean()  # no part stays light


@pytest.mark.parametrize("name", ["pass", "fail"])
def test_on_paper_everything_is_unfolded(pages: dict[str, Path], kept: Path, name: str) -> None:
    paper = chromium.printed(pages[name], kept / f"{name}.pdf")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) <= 40
    reader = shutil.which("pdftotext")
    if reader is None:
        pytest.skip("no pdftotext on PATH: what the pages say was not read")
    text = subprocess.run([reader, "-layout", paper, "-"], capture_output=True, text=True, check=True).stdout
    for words in ("verify.metric_drop", "Learning rate", "Share of allowed", "onnxruntime"):  # in parts that fold
        assert words in text, words
    assert ("What failed" in text) == (name == "fail")
