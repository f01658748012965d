"""CodedTensor: its product, its laws, and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.compression.codes import CodedTensor, group_nonzeros
from slope_compile.errors import ArtifactError


def coded(codes: list, scale: list[float], bits: int = 4, pattern: tuple[int, int] | None = None) -> CodedTensor:
    return CodedTensor(np.array(codes, np.int8), np.array(scale, np.float32), bits, 0, pattern)


def test_dequantize_multiplies_along_the_axis_for_numpy_and_torch() -> None:
    values = [[1, -2], [3, 0], [-8, 7]]
    expected = [[0.5, -1.0], [0.75, 0.0], [-8.0, 7.0]]
    tensor = coded(values, [0.5, 0.25, 1.0])
    assert tensor.dequantize().dtype == np.float32
    assert tensor.dequantize().tolist() == expected
    on_torch = CodedTensor(torch.tensor(values, dtype=torch.int8), torch.tensor([0.5, 0.25, 1.0]), 4, 0, None)
    assert on_torch.dequantize().dtype == torch.float32
    assert on_torch.dequantize().tolist() == expected


def test_dequantize_along_the_last_axis() -> None:
    tensor = CodedTensor(np.array([[1, 2], [3, 4]], np.int8), np.array([10, 100], np.float32), 4, 1, None)
    assert tensor.dequantize().tolist() == [[10, 200], [30, 400]]


def test_density_counts_nonzeros() -> None:
    assert coded([[0, 1, 0, 0], [2, 0, 0, 3]], [1, 1]).density == 3 / 8
    assert CodedTensor(torch.tensor([[0, 1]], dtype=torch.int8), torch.ones(1), 4, 0, None).density == 0.5


def test_check_accepts_what_is_lawful() -> None:
    coded([[-8, 7, 0, 0], [0, 0, 1, 0]], [1e-12, 3.0], pattern=(2, 4)).check("w")
    CodedTensor(torch.tensor([[-2, 1, 0, 0]], dtype=torch.int8), torch.ones(1), 2, 0, (2, 4)).check("w")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (coded([[8, 0]], [1]), ["layer.weight", "code 8", "(0, 0)", "4-bit", "[-8, 7]"]),
        (coded([[0, -9]], [1]), ["code -9", "(0, 1)"]),
        (coded([[1, 0], [0, 1]], [1, -1]), ["scale -1.0", "channel 1"]),
        (coded([[1, 0]], [0]), ["scale 0.0", "channel 0"]),
        (coded([[1, 0]], [float("nan")]), ["scale nan"]),
        (coded([[1, 0]], [float("inf")]), ["scale inf"]),
        (coded([[1, 0]], [1, 1]), ["(2,)", "axis 0", "(1, 2)"]),
        (coded([[1, 0]], [1], bits=9), ["9 bits"]),
        (coded([[1, 0]], [1], pattern=(2, 4)), ["2:4", "(1, 2)", "whole groups"]),
        (coded([[1, 1, 0, 0, 1, 1, 1, 0]], [1], pattern=(2, 4)), ["3 nonzeros", "filter 0", "channels 4 to 7"]),
        (CodedTensor(np.ones((1, 2), np.float32), np.ones(1, np.float32), 4, 0, None), ["float32", "int8"]),
        (CodedTensor(np.ones((1, 2), np.int8), np.ones(1), 4, 0, None), ["float64"]),
    ],
)
def test_check_names_what_is_broken_and_where(tensor: CodedTensor, words: list[str]) -> None:
    with pytest.raises(ArtifactError) as error:
        tensor.check("layer.weight")
    for word in words:
        assert word in str(error.value)


def test_check_names_the_kernel_position_of_a_broken_group() -> None:
    codes = np.zeros((2, 4, 3, 3), np.int8)
    codes[1, :3, 2, 0] = 1
    with pytest.raises(ArtifactError, match=r"filter 1, input channels 0 to 3, position \(2, 0\).*1 groups"):
        CodedTensor(codes, np.ones(2, np.float32), 4, 0, (2, 4)).check("w")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 0), (4, 1), (3, 2), (8, 1), (4, -2)]))
def test_group_nonzeros_equals_a_plain_count(seed: int, group: tuple[int, int]) -> None:
    m, axis = group
    shape = [2, 3, 5]
    shape[axis] = 2 * m
    codes = np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)
    counted = group_nonzeros(codes, m, axis)
    expected = np.zeros(counted.shape, int)
    for place in np.ndindex(*shape):
        group_place = list(place)
        group_place[axis] //= m
        expected[tuple(group_place)] += codes[place] != 0
    assert counted.shape[axis] == 2
    assert np.array_equal(counted, expected)


@pytest.mark.parametrize("m", [0, 3, 256])
def test_group_nonzeros_refuses_groups_that_do_not_fit(m: int) -> None:
    with pytest.raises(ValueError, match="whole groups"):
        group_nonzeros(np.zeros((2, 4), np.int8), m, 1)


def test_codes_import_no_torch() -> None:
    script = "import slope_compile.compression.codes, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
