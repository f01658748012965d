from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detection_files import DETECTOR, coco_folder, detection_recipe
from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNN

from slope_compile.errors import DataError, ModelError, RecipeError
from slope_compile.recipe import ModelSection
from slope_compile.train.data import load_data
from slope_compile.train.detection.models import _copy, _head_rows, detector_names, detector_weights
from slope_compile.train.models import build_model
from slope_compile.train.tasks import make_task


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "detector.py"
    path.write_text(DETECTOR)
    return path


def section(name: str, **keys: Any) -> ModelSection:
    return ModelSection(**{"name": name, "proposals": 10, "detections": 4, **keys})


def test_the_recipes_limits_hold_and_images_are_neither_resized_nor_normalized(file: Path) -> None:
    model: Any = build_model(section(f"{file}:detector"), 5, 96)
    assert isinstance(model, MaskRCNN) and model.training
    assert model.rpn.pre_nms_top_n() == model.rpn.post_nms_top_n() == 2000  # in training, as torchvision has it
    assert model.eval().rpn.pre_nms_top_n() == model.rpn.post_nms_top_n() == 10
    assert model.roi_heads.detections_per_img == 4 and model.roi_heads.fg_bg_sampler.batch_size_per_image == 10
    images = torch.rand(2, 3, 96, 96)
    prepared, _ = model.transform(images)
    assert torch.equal(prepared.tensors, images) and prepared.image_sizes == [(96, 96)] * 2


def test_what_does_not_fit_a_detector_is_refused(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.size is 100: .* multiple of 32 pixels. Set data.size: 96"):
        build_model(section(f"{file}:detector"), 5, 100)
    with pytest.raises(RecipeError, match=r"model.stem: small does not fit the detector"):
        build_model(section(f"{file}:detector", stem="small"), 5, 64)
    with pytest.raises(ModelError, match="tells 5 classes apart, not 6: 5 and the background"):
        build_model(section(f"{file}:too_few"), 5, 64)


def test_a_model_that_learns_masks_needs_data_that_has_them(file: Path, tmp_path: Path) -> None:
    def bare(document: dict[str, Any]) -> None:
        for row in document["annotations"]:
            del row["segmentation"]

    folder = coco_folder(tmp_path / "coco", bare)
    train = folder / "annotations/instances_train2017.json"
    (folder / "annotations/instances_val2017.json").write_text(train.read_text())
    recipe = detection_recipe(file, data={"source": f"coco:{folder}"})
    data = load_data(recipe.data, 0)
    with pytest.raises(DataError, match=r"has boxes only, and .*:detector learns masks"):
        make_task(recipe, data, build_model(recipe.model, 2, 64))
    assert make_task(recipe, data, build_model(section(f"{file}:boxes_only"), 2, 64)).metric == "box_map"


def test_torchvisions_detectors_and_their_weights_are_known_by_name() -> None:
    assert "maskrcnn_resnet50_fpn" in detector_names() and "retinanet_resnet50_fpn" not in detector_names()
    assert detector_weights("maskrcnn_resnet50_fpn")[:1] == ["COCO_V1"]
    assert "IMAGENET1K_V2" in detector_weights("maskrcnn_resnet50_fpn")
    with pytest.raises(ModelError, match=r"has no weights of that name. Did you mean 'COCO_V1'"):
        build_model(section("torchvision/maskrcnn_resnet50_fpn", weights="COCO_V2"), 5, 64)
    with pytest.raises(ModelError, match="Did you mean 'maskrcnn_resnet50_fpn"):
        build_model(section("torchvision/maskrcn_resnet50_fpn"), 5, 64)


def test_pretrained_rows_follow_the_categories_that_have_names() -> None:
    assert _head_rows(["__background__", "person", "N/A", "car"], 2) == [0, 1, 3]
    assert _head_rows(["__background__", "person", "N/A", "car"], 3) is None


def test_pretrained_prediction_layers_are_copied_row_by_row() -> None:
    def heads(classes: int) -> nn.Module:
        layers = {"cls_score": nn.Linear(2, classes), "bbox_pred": nn.Linear(2, 4 * classes)}
        return nn.ModuleDict({"body": nn.Linear(3, 3), "box_predictor": nn.ModuleDict(layers)})

    source, target = heads(4), heads(3)
    _copy(source, target, [0, 1, 3])
    theirs, ours = source.state_dict(), target.state_dict()
    assert torch.equal(ours["body.weight"], theirs["body.weight"])
    assert torch.equal(ours["box_predictor.cls_score.weight"], theirs["box_predictor.cls_score.weight"][[0, 1, 3]])
    kept = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    assert torch.equal(ours["box_predictor.bbox_pred.bias"], theirs["box_predictor.bbox_pred.bias"][kept])
    untouched = {name: tensor.clone() for name, tensor in ours.items() if "predictor" in name}
    _copy(heads(7), target, None)
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in untouched.items())
