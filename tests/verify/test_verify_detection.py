from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from slope_compile.errors import ArtifactError
from slope_compile.train.detection.task import DetectionBatch
from slope_compile.verify.detection import DetectionScore
from slope_compile.verify.metric import MetricTask, References, check_metric
from slope_compile.verify.verdict import Check, Once, attempt

SIDE, ROWS = 32, 3  # the graph answers with three rows an image, padded with zeros


def batch() -> DetectionBatch:
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    mask[:, 8:24, 4:20] = 1
    target = {
        "boxes": torch.tensor([[4.0, 8, 20, 24]]), "labels": torch.tensor([2]), "iscrowd": torch.tensor([0]),
        "area": torch.tensor([256.0]), "masks": mask,
    }  # fmt: skip
    return DetectionBatch(torch.zeros(1, 3, SIDE, SIDE), [target])


def outputs(**changes: Any) -> dict[str, np.ndarray]:
    boxes, masks = np.zeros((1, ROWS, 4), np.float32), np.zeros((1, ROWS, 28, 28), np.float32)
    boxes[0, 0], masks[0, 0] = (4, 8, 20, 24), 1
    labels, scores = np.array([[2, 0, 0]]), np.array([[0.9, 0, 0]], np.float32)
    return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks, **changes}


def test_padding_is_no_detection_and_masks_are_pasted() -> None:
    score = DetectionScore(masks=True)
    score.update(outputs(), batch())
    figures = score.compute()
    assert figures["box_map"] == figures["mask_map"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"scores": np.full((1, ROWS), np.nan)}, "scores have NaN"), ({"masks": np.zeros((2, 1, 28, 28))}, "'masks'")],
)
def test_broken_outputs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        DetectionScore(masks=True).update(outputs(**changes), batch())


class Session:
    """Answers as an ONNX session would, whatever it is given."""

    def __init__(self, **changes: Any) -> None:
        self._outputs = outputs(**changes)

    def get_inputs(self) -> Any:
        return [type("Value", (), {"name": "input"})]

    def get_outputs(self) -> Any:
        return [type("Value", (), {"name": name}) for name in self._outputs]

    def run(self, names: None, feed: Any) -> Any:
        return list(self._outputs.values())


def judge(**changes: Any) -> Check:
    task = MetricTask(
        lambda: iter([(batch().images.numpy(), batch())]), items=1, budget=0.1, fp32=1.0, compressed=0.95,
        metric="mask_map", score=lambda: DetectionScore(masks=True), others={"box_map": References(1.0, 1.0)},
    )  # fmt: skip
    session: Any = Once(lambda: Session(**changes))
    return attempt("metric", lambda: check_metric(Once(lambda: task), session, None, lambda _: None))


def test_boxes_and_masks_are_both_judged() -> None:
    check = judge()
    assert check.status == "pass" and check.figures["metric"] == "mask_map" and check.figures["onnx"] == 1
    assert check.figures["box_map"]["onnx"] == 1
    assert check.detail == (
        "mask mAP 1.0000 on 1 images (FP32 1.0000, the trained model 0.9500), "
        "box mAP 1.0000 (FP32 1.0000, the trained model 1.0000), drop within 10.00%"
    )
    worse = judge(boxes=np.repeat([[[4, 8, 20, 20]]], ROWS, axis=1).astype(np.float32))
    assert worse.status == "fail" and "box mAP" in worse.detail and "below FP32" in worse.detail
