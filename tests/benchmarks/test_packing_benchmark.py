"""The figures of the packing benchmark are of what they say: shapes, codes and entropies that are counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import packing
from benchmarks.packing import coded_of, entropy, made, main, shapes, subject
from slope_compile.codes_file import StoredCodes
from slope_compile.compression.codes import CodedTensor

ROOT = Path(__file__).resolve().parents[2]


def test_the_shapes_are_those_of_resnet18() -> None:
    # 11,689,512 parameters, less 9,600 of norms and 1,000 biases
    assert sum(math.prod(shape) for _, shape in shapes()) == 11_678_912


def test_codes_obey_the_laws_and_keep_the_largest() -> None:
    weight = np.array([[0.1, -3.0, 2.0, 0.5], [1.0, 1.5, -0.2, 0.3]], np.float32)
    coded, step = coded_of(weight.copy(), 4, (2, 4))
    coded.check("it")
    assert step == np.float32(2 * np.abs(weight).mean() / math.sqrt(7))
    assert (coded.codes != 0).tolist() == [[False, True, True, False], [True, True, False, False]]


def test_an_entropy_by_hand() -> None:
    codes = np.array([[1, 0, 0, 2, 0, 0, 0, 0], [1, 0, 0, 2, 0, 0, 0, 0]], np.int8)
    scale = np.ones(2, np.float32)
    # two masks, each in half of the groups: 4 bits; two values, each in half of the places: 4 bits
    assert entropy(CodedTensor(codes, scale, 4, 0, (2, 4))) == 1.0
    assert entropy(CodedTensor(np.array([[1, 1, 2, 3]], np.int8), scale[:1], 4, 0, None)) == 4 * 1.5 / 8


def test_a_small_subject_is_measured_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "shapes", lambda: iter([("conv1.weight", (8, 3, 3, 3)), ("a.weight", (32, 64, 3, 3))]))
    monkeypatch.setattr(packing, "LEVELS", (1,))
    here = lambda which, *files: packing.measured(lambda: packing.PROCESSES[which](*files))  # noqa: E731
    monkeypatch.setattr(packing, "child", here)
    train, exported = made(3, tmp_path / "made")
    found = subject(train, exported, tmp_path / "work")
    figures = found["coded"]["2:4"]
    assert figures["bytes"]["weights"] == 32 * 64 * 9 and figures["bytes"]["nominal"] == 32 * 64 * 9 * 3 // 16
    bits = figures["bits_a_weight"]
    assert bits["nominal"] < bits["entropy"] < bits["packed"] < bits["indices"] < bits["onnx"] < bits["fp32"] == 32
    files = found["files"]
    assert files["onnx"] == exported.stat().st_size > files["onnx_zstd"] > files["onnx_packed"]
    assert found["coders"]["zstd 1"]["bytes"] == found["coded"]["all"]["bytes"]["packed"]
    assert list(StoredCodes(train / "codes.safetensors")) == ["a.weight", "conv1.weight"]


def test_the_published_figures_are_in_the_docs() -> None:
    figures = json.loads((ROOT / "benchmarks/results/packing.json").read_text())
    page = (ROOT / "docs/packing.md").read_text(encoding="utf-8")
    assert figures["command"] in page
    subjects = [*figures["subjects"].values()]
    packed = [subjects[i]["coded"]["2:4"]["bits_a_weight"]["packed"] for i in (0, 3, 2, 1)]
    assert "| **packed, with scales** | " + " | ".join(f"**{bits:.3f}**" for bits in packed) + " |" in page
    demo = subjects[0]
    for name in ("zstd 1", "zstd 3", "zstd 9", "zstd 19", "zlib 9, Huffman only", "zlib 9", "lzma", "bz2"):
        row = demo["coders"][name]
        shown = name.replace("zlib 9, H", "zlib, H")
        assert f"| {shown} | {row['bytes']:,} | {row['cpu_seconds']:.2f} |" in page
    for row, name in {
        "ONNX, INT4": "onnx",
        "zstd, level 19, of that file": "onnx_zstd",
        "packed model": "model_packed",
    }.items():
        sizes = [subjects[i]["files"][name] / 1e6 for i in (0, 3, 2, 1)]
        assert f"| {row} | " + " | ".join(f"{size:.2f}" for size in sizes) + " |" in page


def test_where_to_write_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "--out names the file to write" in capsys.readouterr().err
