"""A compressed Mask R-CNN through export, ONNX Runtime, verification and TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from detectors import CLASSES, SIDE, detector, images
from onnx import numpy_helper
from safetensors.numpy import load_file

import slope_compile as sc
from slope_compile.compression.api import codes
from slope_compile.export.detection import paste_masks
from slope_compile.qdq.activations import stored_quantizers
from slope_compile.qdq.reader import coded_weights
from slope_compile.verify.chain.runners import reference_session
from slope_compile.verify.model import verify_model

pytestmark = pytest.mark.e2e
DETECTIONS, LEVELS = 8, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model = detector(levels=LEVELS)
    sc.compress(model)
    path = tmp_path_factory.mktemp("detector") / "m.onnx"
    layers = sc.export(model, images(3), path)
    return SimpleNamespace(
        model=model, path=path, layers=layers["layers"], golden=path.with_suffix(".golden.safetensors")
    )


def test_every_batch_gives_torchvisions_own_answer(run: SimpleNamespace) -> None:
    session = reference_session(run.path)
    batch = images(5, seed=2)
    with torch.no_grad():
        answer = run.model(list(batch))
    for count in (1, 5):
        boxes, labels, scores, masks = session.run(
            ["boxes", "labels", "scores", "masks"], {"input": batch[:count].numpy()}
        )
        assert (boxes.shape, masks.shape) == ((count, DETECTIONS, 4), (count, DETECTIONS, 28, 28))
        for index in range(count):
            theirs = answer[index]
            found = len(theirs["scores"])
            assert found
            assert np.array_equal(labels[index, :found], theirs["labels"])
            np.testing.assert_allclose(boxes[index, :found], theirs["boxes"], rtol=0, atol=1e-3)
            np.testing.assert_allclose(scores[index, :found], theirs["scores"], rtol=0, atol=1e-5)
            pasted = paste_masks(masks[index, :found], boxes[index, :found], SIDE, SIDE)
            np.testing.assert_allclose(pasted, theirs["masks"][:, 0], rtol=0, atol=1e-3)


def test_golden_outputs_are_torchvisions_by_name(run: SimpleNamespace) -> None:
    kept = load_file(run.golden)
    assert sorted(kept) == ["inputs", "outputs.boxes", "outputs.labels", "outputs.masks", "outputs.scores"]
    with torch.no_grad():
        answer = run.model(list(torch.from_numpy(kept["inputs"])))
    for index, theirs in enumerate(answer):
        found = len(theirs["scores"])
        assert np.array_equal(kept["outputs.boxes"][index, :found], theirs["boxes"])
        assert not kept["outputs.scores"][index, found:].any()


def test_a_head_that_all_levels_share_is_one_coded_weight(run: SimpleNamespace) -> None:
    weights = {weight.name: weight for weight in coded_weights(run.path)}
    expected = codes(run.model)
    assert len([weight for weight in weights.values() if weight.codes is not None]) == len(expected)
    head = "rpn.head.conv.0.0.weight"
    assert np.array_equal(weights[head].codes, expected[head].codes)
    proto = onnx.load(run.path)
    assert len([node for node in proto.graph.node if head in node.input]) == LEVELS
    rows = {row["name"]: row for row in run.layers}
    assert rows[head]["placement"] == "int4-storage"
    assert rows["roi_heads.mask_predictor.conv5_mask.weight"]["placement"] == "float"
    assert rows["roi_heads.box_predictor.cls_score.weight"]["shape"] == [CLASSES, 32]


def test_it_verifies(run: SimpleNamespace) -> None:
    verdict = sc.verify(run.path, model=run.model)
    assert verdict.verdict == "pass", [check.detail for check in verdict.checks]
    figures = verdict["parity.onnx"].figures
    assert figures["detections"] >= 20 and figures["off"] == 0
    assert "detections apart" in verdict["parity.onnx"].detail


@pytest.mark.parametrize("tensor", ["backbone.body.layer1.0.weight", "roi_heads.box_predictor.cls_score.weight"])
def test_damaged_weights_fail(tensor: str, run: SimpleNamespace, tmp_path: Path) -> None:
    proto = onnx.load(run.path)
    scale = next(t for t in proto.graph.initializer if t.name == f"{tensor}.scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.02), scale.name))
    onnx.save(proto, tmp_path / "m.onnx")
    verdict = verify_model(tmp_path / "m.onnx", codes=codes(run.model), model=run.model, golden=run.golden)
    assert {"codes", "parity.onnx"} <= {check.name for check in verdict.checks if check.status == "fail"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Without masks, with activations of 8 bits; all proposals are equally likely."""
    model = detector(levels=2, masks=False)
    sc.compress(model, activation_bits=8)
    truth = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
    model.train()(list(images(2)), [truth] * 2)  # sets the steps
    with torch.no_grad():
        model.rpn.head.cls_logits.weight.zero_()  # all are equal
    path = tmp_path_factory.mktemp("quantized") / "m.onnx"
    sc.export(model.eval(), images(2), path)
    return SimpleNamespace(model=model, path=path)


def test_quantized_activations_are_the_trained_ones_in_each_level(quantized: SimpleNamespace) -> None:
    """Integers make equal objectness common, and then the order of proposals must be the file's too."""
    verdict = sc.verify(quantized.path, model=quantized.model)
    assert verdict.verdict == "pass", [check.detail for check in verdict.checks]
    assert verdict["parity.onnx"].figures["detections"] >= 10
    names = [one.name for one in stored_quantizers(quantized.path)]
    assert names.count("rpn.head.bbox_pred.input") == 2


def test_tensorrt_rtx_builds_it(quantized: SimpleNamespace, tmp_path: Path) -> None:
    """A head that levels share, and activations; the masks are in the chain of commands."""
    pytest.importorskip("tensorrt_rtx")
    from slope_compile.build.engine import build_engine
    from slope_compile.events import Events
    from slope_compile.recipe import BatchRange, BuildSection

    section = BuildSection(backend="tensorrt-rtx", batch=BatchRange(min=1, opt=1, max=2))
    built = build_engine(quantized.path, "a100", section, tmp_path, Events())
    assert (tmp_path / "model.engine").stat().st_size > 100_000
    assert built["header"]["profile"]["input"]["max"] == [2, 3, SIDE, SIDE]
    assert built["summary"]["coded"] == len(codes(quantized.model))
