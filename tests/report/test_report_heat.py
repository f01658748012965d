from __future__ import annotations

import json
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from report_pages import check
from report_runs import layer_errors, make_run

from slope_compile.report.heat import LayerError, heat, hop_errors
from slope_compile.report.page import render


def cells(page: str) -> list[list[tuple[str, str]]]:
    """Class and text of each coloured cell, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    found = [re.findall(r'<td class="n heat (\w+)">(.*?)</td>', row) for row in rows]
    return [[(style, re.sub("<.*?>", " ", text)) for style, text in row] for row in found if row]


@pytest.mark.parametrize(
    ("relative", "allowed", "style", "words"),
    [
        (0.0, 1e-5, "h0", "0, 1e−05 allowed"),
        (1e-9, 1e-5, "h1", "1e−09, 1e−05 allowed"),
        (9.9e-8, 1e-5, "h2", "9.9e−08, 1e−05 allowed"),
        (1e-6, 1e-5, "h3", "1e−06, 1e−05 allowed"),
        (1e-5, 1e-5, "h4", "1e−05, 1e−05 allowed"),
        (1.01e-5, 1e-5, "h5", "✗ 1e−05, 1e−05 allowed"),
        (math.nan, 1e-5, "h5", "✗ not a number, 1e−05 allowed"),
        (math.inf, 1e-5, "h5", "✗ ∞, 1e−05 allowed"),
        (0.0, 0.0, "h0", "0, 0 allowed"),
        (1e-12, 0.0, "h5", "✗ 1e−12, 0 allowed"),
        (1e-5, None, "hn", "1e−05, no limit"),
        (1e-5, math.nan, "h5", "✗ 1e−05, not a number allowed"),
        (None, 1e-5, "hn", "not measured"),
    ],
)
def test_the_colour_is_the_decade_of_the_share(
    relative: float | None, allowed: float | None, style: str, words: str
) -> None:
    error = LayerError("conv", "Conv", relative, allowed)
    assert error.style == style and error.words == words


def test_a_strip_a_hop_and_a_cell_a_layer() -> None:
    page = heat(make_run())
    strips = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    assert [len(list(strip.iter("rect"))) for strip in strips] == [11, 11, 11]
    assert strips[0].get("aria-label") == "trained → folded, 11 layers: no layer differs at all"
    assert "largest at fc: 0.004, 43" in (strips[2].get("aria-label") or "")
    table = cells(page)
    assert len(table) == 11 and all(len(row) == 3 for row in table)
    for column, strip in enumerate(strips):  # both show the same
        assert [rect.get("class") for rect in strip.iter("rect")] == [row[column][0] for row in table]
    assert table[2][2] == ("hn", "–")
    assert "layer1.0.conv2: not measured" in page


def test_a_layer_beyond_its_limit_is_named_with_a_cross() -> None:
    document = layer_errors()
    document["layers"][4]["errors"]["parity.onnx"] = {"relative": 0.5, "allowed": 1e-5}
    document["layers"][7]["errors"]["parity.onnx"] = {"relative": "nan", "allowed": 1e-5}
    page = heat(make_run(layer_errors={"a100": document}))
    assert "✗ 2 layers beyond the limit, the first is layer1.1.conv2 (✗ 0.5, 1e−05 allowed)" in page
    assert cells(page)[4][1][0] == "h5" and cells(page)[4][1][1].startswith("✗ 0.5")
    assert cells(page)[7][1][1].startswith("✗ not a number")


def test_two_hundred_layers_are_drawn_and_their_numbers_folded() -> None:
    names = [f"blocks.{i}.attn.qkv" for i in range(240)]
    page = render(make_run(layer_errors={"a100": layer_errors(names)}))
    document = check(page)
    assert "The numbers: 240 layers, 3 comparisons" in document.text()
    assert re.search(r"<details><summary>The numbers: 240 layers", page)
    assert 'class="strip"' in page and 'class="strip apart"' not in page
    assert len(page.encode()) < 400_000


def test_hops_that_tell_an_error_without_a_limit() -> None:
    document = layer_errors()
    for row in document["layers"]:
        row["errors"]["parity.onnx"]["allowed"] = None
    page = heat(make_run(layer_errors={"a100": document}))
    assert "largest at fc: 9e−07." in page and "hn" in cells(page)[0][1][0]


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (None, "this verification kept none"),
        ({"hops": [], "layers": []}, "no comparison could be made layer by layer"),
        ({"hops": [{"check": "parity.onnx", "from": "a", "to": "b"}], "layers": []}, "no comparison could be made"),
        ({}, "this verification kept none"),
    ],
)
def test_what_is_missing_is_said(document: Any, why: str) -> None:
    errors = {} if document is None else {"a100": document}
    page = heat(make_run(layer_errors=errors))
    assert "There are no errors by layer for a100" in page and "<svg" not in page
    assert why in page or not document
    assert "Nothing was verified" in heat(make_run(verdicts={}))


def test_the_document_is_read_hop_by_hop_in_graph_order() -> None:
    hops = hop_errors(json.loads(json.dumps(layer_errors())))
    assert [hop.check for hop in hops] == ["parity.folded", "parity.onnx", "parity.placed"]
    assert [error.layer for error in hops[0].errors][:2] == ["conv1", "layer1.0.conv1"]
