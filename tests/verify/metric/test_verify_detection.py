from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from slope_compile.errors import ArtifactError
from slope_compile.train.detection.task import DetectionBatch
from slope_compile.train.validation import Detected, Objects
from slope_compile.verify.metric.check import MetricTask, References, check_metric
from slope_compile.verify.metric.detector import DetectionScore
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


def judge(facts: dict[str, Any] | None = None, **changes: Any) -> Check:
    known = {"items": 1, "budget": 0.1, "fp32": 1.0, "compressed": 0.95, "others": {"box_map": References(1.0, 1.0)}}
    task = MetricTask(
        lambda: iter([(batch().images.numpy(), batch())]), metric="mask_map", score=lambda: DetectionScore(masks=True),
        **{**known, **(facts or {})},
    )  # fmt: skip
    session: Any = Once(lambda: Session(**changes))
    return attempt("metric", lambda: check_metric(Once(lambda: task), session, None, lambda _: None))


def test_boxes_and_masks_are_both_judged() -> None:
    check = judge()
    assert check.status == "pass" and check.figures["metric"] == "mask_map" and check.figures["onnx"] == 1
    assert check.figures["box_map"]["onnx"] == 1
    assert check.detail == (
        "mask mAP 1.0000 on 1 images (FP32 1.0000, the trained model 0.9500), "
        "box mAP 1.0000 (FP32 1.0000, the trained model 1.0000), drop within 10.00%; "
        "no interval: training kept no answers to single images"
    )
    worse = judge(boxes=np.repeat([[[4, 8, 20, 20]]], ROWS, axis=1).astype(np.float32))
    assert worse.status == "fail" and "box mAP" in worse.detail and "below FP32" in worse.detail


def recorded(masks: bool = True, **changes: Any) -> Detected:
    """What a model that gives these outputs answers."""
    score = DetectionScore(masks)
    score.update(outputs(**changes), batch())
    score.compute()
    return score.answers()


def test_recorded_detections_give_both_drops_an_interval() -> None:
    """One image tells next to nothing: of images unlike it there may be up to 97.5 %."""
    narrow = np.repeat([[[4, 8, 20, 20]]], ROWS, axis=1).astype(np.float32)  # IoU 0.75: right at six thresholds of ten
    record = {"fp32": recorded(), "compressed": recorded(boxes=narrow)}
    known = {"compressed": 0.6, "others": {"box_map": References(1.0, 0.6)}, "record": record}
    check = judge(known)
    assert check.status == "pass" and check.figures["compressed"] == 0.6
    for figures in (check.figures, check.figures["box_map"]):
        assert figures["interval"] == [-0.975, 0.975] and figures["accuracy_interval"] == [0.025, 1.0]
        assert figures["interval_from_compressed"] == [pytest.approx(-2 / 3 - 0.975, abs=1e-6), pytest.approx(0.308333)]
        assert figures["certain"] is False and figures["resamples"] == 1000
    assert "95 % interval of the drop of mask mAP from FP32 -97.50% to 97.50%: 1 images cannot tell" in check.detail
    assert "of the drop of box mAP from FP32" in check.detail


def test_another_truth_or_another_task_is_told_apart() -> None:
    whole = recorded()
    others = {"compressed": 1.0}
    moved = Objects(whole.objects.image, whole.objects.label + 1, whole.objects.count)
    elsewhere = Detected(whole.items, moved, {k: replace(m, label=m.label + 1) for k, m in whole.kinds.items()})
    check = judge({**others, "record": dict.fromkeys(("fp32", "compressed"), elsewhere)})
    assert check.status == "fail" and "it holds other objects" in check.detail
    check = judge({**others, "record": dict.fromkeys(("fp32", "compressed"), recorded(masks=False))})
    assert check.status == "fail" and "of another kind of task" in check.detail
