from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import box_iou, nms

from slope_compile.export.detection.suppress import overlaps, suppress
from slope_compile.export.float_graph import float_graph
from slope_compile.export.passes import run_pass
from slope_compile.export.passes.optimize import Optimize


def chain(length: int, step: float = 2.0, width: float = 10.0) -> torch.Tensor:
    """Boxes in a row: each overlaps the next one only (IoU 8/12), so that every second one stays."""
    left = torch.arange(length) * step
    return torch.stack([left, torch.zeros(length), left + width, torch.full((length,), width)], 1)


def greedy(boxes: torch.Tensor, threshold: float) -> list[int]:
    """torchvision's own answer, for boxes that are sorted by score already."""
    kept: list[int] = nms(boxes, torch.linspace(1, 0.1, len(boxes)), threshold).tolist()
    return kept


def kept(boxes: torch.Tensor, threshold: float, valid: torch.Tensor | None = None) -> list[int]:
    every = torch.ones(len(boxes)) if valid is None else valid
    found: list[int] = suppress(overlaps(boxes, threshold), every).nonzero().flatten().tolist()
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([0.1, 0.3, 0.5, 0.7]), st.floats(5, 60))
def test_any_boxes_are_suppressed_as_torchvision_does(seed: int, count: int, threshold: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * spread
    boxes = torch.cat([corner, corner + 20 * torch.rand(count, 2, generator=generator)], 1)
    assert kept(boxes, threshold) == greedy(boxes, threshold)


@pytest.mark.parametrize("length", [2, 3, 17, 200])
def test_the_longest_chain_is_followed_to_its_end(length: int) -> None:
    assert kept(chain(length), 0.5) == list(range(0, length, 2)) == greedy(chain(length), 0.5)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 2 / 3])
def test_an_overlap_of_exactly_the_threshold_is_decided_as_by_torchvision(threshold: float) -> None:
    boxes = [chain(2, 10 * (1 - t) / (1 + t)) for t in np.linspace(threshold - 3e-7, threshold + 3e-7, 41)]
    answers = {tuple(kept(pair, threshold)) for pair in boxes}
    assert [kept(pair, threshold) for pair in boxes] == [greedy(pair, threshold) for pair in boxes]
    assert answers == {(0,), (0, 1)}
    wide = torch.tensor([[0, 0, 10, 1], [0, 0, 3, 1], [0, 0, 7, 1], [0, 0, 5, 1]], dtype=torch.float32)
    assert kept(wide, threshold) == greedy(wide, threshold)


def test_boxes_that_are_not_valid_neither_stay_nor_remove() -> None:
    assert kept(chain(4), 0.5, torch.tensor([0.0, 1, 1, 1])) == [1, 3]
    assert kept(chain(4), 0.5, torch.zeros(4)) == []


def test_boxes_without_area_are_left_alone() -> None:
    boxes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 4, 4]])
    assert kept(boxes, 0.5) == greedy(boxes, 0.5) == [0, 1, 2]


def test_overlaps_are_those_of_earlier_boxes_with_later_ones() -> None:
    boxes = chain(5)
    assert torch.equal(overlaps(boxes, 0.5), torch.triu((box_iou(boxes, boxes) > 0.5).float(), 1))


class Suppress(nn.Module):
    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        return suppress(overlaps(boxes, 0.5), torch.ones_like(boxes[..., 0]))


@pytest.mark.parametrize("opset", [21, 25])
def test_the_loop_in_onnx_gives_the_same_answer(opset: int, tmp_path: Path) -> None:
    boxes = torch.stack([chain(40), chain(40, step=1.0)])
    graph = float_graph(Suppress().eval(), (40, 4), opset)
    run_pass(Optimize(opset), graph)
    ir.save(graph, tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    three = torch.cat([boxes, chain(40, step=9.0)[None]])
    (answer,) = session.run(None, {"input": three.numpy()})
    assert np.array_equal(answer, Suppress()(three).numpy())
    assert answer.sum(1).tolist() == [20, 10, 40]
