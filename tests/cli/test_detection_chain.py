from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import Cli

sys.path.append(str(Path(__file__).parents[1] / "train/detection"))
from detection_files import DETECTOR, easy_folder

pytestmark = pytest.mark.e2e
RECIPE = """
model: {name: detector.py:detector, proposals: 32, detections: 6}
data: {source: "coco:set", size: 64, batch: 4, workers: 0, augment: none}
train: {pretrain_epochs: 6, epochs: 2, optimizer: adamw, lr: 1.0e-3, pretrain_lr: 5.0e-3, warmup_epochs: 0.5}
export: {samples: 2}
build: {batch: {min: 1, opt: 2, max: 2}}
verify: {metric_drop: 0.4}
"""


def test_a_detector_from_training_to_its_verdict(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "detector.py").write_text(DETECTOR)
    easy_folder(tmp_path / "set")
    (tmp_path / "d.yaml").write_text(RECIPE)
    done = cli("run", "d.yaml", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert done.returncode == 0, (done.stderr, told)
    checks = {check["name"]: check for check in told["checks"]}
    assert all(checks[name]["status"] == "pass" for name in ("digest", "pattern", "codes", "parity.onnx", "metric"))
    assert checks["parity.onnx"]["figures"]["detections"] >= 4  # both sides of two samples found something
    assert told["metric"] == "mask_map" and set(told["other_metrics"]) == {"box_map"}
    for values in (told["accuracies"], told["other_metrics"]["box_map"]):
        assert set(values) == {"fp32", "compressed", "onnx"}
        assert min(values.values()) > 0.3
        assert values["onnx"] == pytest.approx(values["compressed"], abs=0.01)
    for metric, values in (("mask_map", told["accuracies"]), ("box_map", told["other_metrics"]["box_map"])):
        low, high = told["intervals"][metric]["onnx"]
        assert low <= values["onnx"] <= high and low < high
        assert isinstance(told["intervals"][metric]["certain"], bool) and len(told["intervals"][metric]["drop"]) == 2
    page = (tmp_path / "runs/d/report.html").read_text()
    assert "Mask mAP" in page and "Box mAP" in page and "Accuracy" not in page
    assert "mask mAP" in done.stderr and "box mAP" in done.stderr
