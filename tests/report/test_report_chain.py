from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import check
from report_runs import FAILED, VERDICT, hop, make_run

from slope_compile.report.chain import chain
from slope_compile.report.hops import hops_of, share_text

STAGES = ("Trained model", "Folded model", "ONNX file", "ONNX, deployed", "Placed ONNX", "Engine")


def pictures(verdict: Any = VERDICT, **changes: Any) -> list[ElementTree.Element]:
    """The lying picture of the chain, then the standing one."""
    page = chain(make_run(verdicts={"a100": verdict}, **changes))
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def texts(picture: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()).replace("\N{NO-BREAK SPACE}", " ") for text in picture.iter("text")]


def test_both_pictures_show_every_stage_and_every_hop_in_words() -> None:
    for picture in pictures():
        told = " | ".join(texts(picture))
        for words in (*STAGES, "placed.onnx", "tensorrt-rtx 1.7.1", "a100, SM 8.0"):
            assert words in told, words
        for words in ("parity.folded", "7.2e−07", "allowed 8.5e−05", "0.00032", "not judged", "✓ pass", "not measured"):
            assert words in told, words
        assert told.count("✓ pass") == 4 and told.count("○ not checked") == 1
        label = picture.get("aria-label") or ""
        assert "folded to onnx: pass, error 7.2e−07, allowed 8.5e−05" in label
        assert "onnx to engine: not checked, not measured" in label


def test_arrows_join_the_boxes_that_were_compared() -> None:
    """Each path of the lying picture begins at an edge of its first box and ends at the left edge of its second."""
    (lying, _), hops = pictures(), hops_of(VERDICT)
    boxes = {
        group.findtext("title"): tuple(float(rect.get(key, "")) for key in ("x", "y", "width", "height"))
        for group in lying.iter("g")
        if (rect := group.find("rect")) is not None
    }
    assert list(boxes) == ["trained", "folded", "onnx", "onnx-default", "placed", "engine"]
    paths = [p.get("d", "") for p in lying.iter("path") if "arrow" in p.get("class", "")]
    for found, path in zip(hops, paths, strict=True):
        (x, y, width, height), (to_x, to_y, _, _) = boxes[found.start], boxes[found.end]
        start = tuple(map(float, re.match(r"M([\d.]+) ([\d.]+)", path).groups()))  # type: ignore[union-attr]
        assert start == (x + width, y + height / 2) or (x < start[0] < x + width and start[1] == y + height)
        assert float(path.rpartition("H")[2]) == to_x - 9
        if to_y != y:
            assert f"V{to_y + height / 2:g}H" in path
    spots = [(x, y) for x, y, _, _ in boxes.values()]
    assert len(set(spots)) == len(spots)


def test_status_is_told_by_sign_and_word_and_line() -> None:
    for picture in pictures(FAILED):
        told = " | ".join(texts(picture))
        assert "✗ FAIL" in told and told.count("○ not checked") == 3 and "0.41" in told
        classes = [path.get("class") for path in picture.iter("path")]
        assert classes.count("arrow fail") == 1 and classes.count("arrow open") == 3


def test_a_verification_older_than_the_chain() -> None:
    """Without from, to and the folded model: trained to ONNX, as far as names of checks tell."""
    figures = {"relative": 7.24e-07, "tolerance": 8.52e-05}
    old = [
        {"name": name, "status": "pass", "detail": "", "figures": figures}
        for name in ("parity.onnx", "parity.onnx-default", "parity.engine")
    ]
    ends = [(found.start, found.end) for found in hops_of({"checks": old})]
    assert ends == [("trained", "onnx"), ("onnx", "onnx-default"), ("onnx", "engine")]
    assert "Folded model" not in "".join(texts(pictures({"verdict": "pass", "checks": old})[0]))


def test_quantized_activations_are_judged_segment_by_segment() -> None:
    figures = {"relative": 0.0131, "tolerance": 8.5e-05, "segment_relative": 2e-06, "segment_tolerance": 9e-05}
    (found,) = hops_of({"checks": [{"name": "parity.onnx", "status": "pass", "detail": "", "figures": figures}]})
    assert (found.error, found.allowed) == (2e-06, 9e-05) and "segment by segment" in found.words


@pytest.mark.parametrize(
    ("error", "allowed", "told", "share"),
    [
        (0.0, 1e-4, "error 0, allowed 0.0001", "0.00 %"),
        ("nan", 1e-4, "error not a number, allowed 0.0001", "not a number"),
        ("inf", 1e-4, "error ∞, allowed 0.0001", "∞"),
        (3e-9, 1e-4, "error 3e−09, allowed 0.0001", "less than 0.01 %"),
        (0.5, 0.25, "error 0.5, allowed 0.25", "200 %"),
        (0.97, 7e-06, "error 0.97, allowed 7e−06", "138,571 times"),
        (0.5, None, "error 0.5, not judged", "–"),
        (0.5, 0.0, "error 0.5, allowed 0", "–"),
        ("<b>", "x", "not measured", "–"),
    ],
)
def test_any_error_has_words(error: Any, allowed: Any, told: str, share: str) -> None:
    (found,) = hops_of({"checks": [hop("onnx", "folded", "onnx", error, allowed)]})
    assert told in found.words and share_text(found.share).replace("\N{NO-BREAK SPACE}", " ") == share


def test_targets_have_a_picture_each_and_what_is_not_built_says_so() -> None:
    document = check(f"<h1></h1><h2></h2>{chain(make_run(verdicts={'a100': VERDICT, 'rtx': FAILED}))}")
    text = document.text()
    assert len(document.svgs) == 4
    assert "For a100" in text and "For rtx" in text and "for rtx" in text and "not built" in text


def test_without_comparisons_there_is_a_sentence() -> None:
    assert "there is no chain to show" in chain(make_run(verdicts={}))
    assert "No stages were compared for a100" in chain(make_run(verdicts={"a100": {"verdict": "pass", "checks": []}}))


names = st.text(max_size=40)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(names, names, names, st.floats() | names), min_size=1, max_size=7), st.integers(0, 3))
def test_any_graph_of_stages_is_drawn(edges: list[tuple[str, str, str, Any]], same: int) -> None:
    """Loops, islands, several rows, any text: the pictures are well-formed and no two boxes lie on each other."""
    pool = [start for start, *_ in edges][: same + 1]
    checks = [hop(name, start, pool[i % len(pool)] or end, e, 1e-3) for i, (name, start, end, e) in enumerate(edges)]
    lying, standing = pictures({"verdict": "fail", "checks": checks})
    for picture in (lying, standing):
        corners = [(rect.get("x"), rect.get("y")) for rect in picture.iter("rect")]
        assert len(corners) == len(set(corners)) > 0
        width = float((picture.get("viewBox") or "").split()[2])
        assert all(float(rect.get("x", "")) + float(rect.get("width", "")) <= width for rect in picture.iter("rect"))
