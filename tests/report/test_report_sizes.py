from __future__ import annotations

import re

from report_runs import make_run

from slope_compile.report.data import SizeRow
from slope_compile.report.sizes import sizes

ROWS = [
    SizeRow("train", "FP32 model", 40_000_000),
    SizeRow("train", "counted: 32 bits x kept weights", 20_000_000),
    SizeRow("train", "nominal: bits x kept weights", 2_500_000),
    SizeRow("pack", "Packed file", 3_000_000),
    SizeRow("train", "codes, one byte each", 10_000_000, step=False),
    SizeRow("export", "ONNX file", 5_000_000),
    SizeRow("build/a100", "TensorRT engine", 8_000_000),
    SizeRow("build/orin", "TensorRT engine", 4_000_000),
]


def test_each_step_is_told_against_fp32_and_against_the_step_before() -> None:
    """Engines come from the ONNX file, not from each other; what is kept aside is no step."""
    page = sizes(make_run(sizes=ROWS))
    rows = re.findall(r'<td class="n">([^<]*)(?:<span class="sub">([^<]*)</span>)?</td>', page)
    assert rows[1::2] == [
        ("1×", ""),
        ("2.0× smaller", "−20.0 MB"),
        ("16.0× smaller", "−17.5 MB"),
        ("13.3× smaller", "+500 kB"),
        ("4.0× smaller", ""),
        ("8.0× smaller", "+2.00 MB"),
        ("5.0× smaller", "+3.00 MB"),
        ("10.0× smaller", "−1.00 MB"),
    ]
    assert rows[::2][5] == ("5.00 MB", "5,000,000 B")
    bars = re.findall(r"<svg.*?</svg>", page)
    shown = [re.findall(r'width="([\d.]+)"[^>]* class="(\w+)"', bar) for bar in bars]
    assert shown[1] == [("100", "track"), ("100", "gone"), ("50", "fill")]
    assert shown[4] == [("100", "track"), ("25", "fill")]
    assert shown[6] == [("100", "track"), ("20", "fill"), ("7.5", "grown")]


def test_no_sizes_and_no_bytes() -> None:
    assert "No sizes" in sizes(make_run(sizes=[]))
    assert "<svg" in sizes(make_run(sizes=[SizeRow("train", "FP32 model", 0)]))
