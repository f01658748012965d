"""The static form against torchvision's own forward, which picks boxes one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectors import SIDE, detector, images
from torch import nn
from torchvision.models.detection import KeypointRCNN
from torchvision.ops import MultiScaleRoIAlign

from slope_compile.errors import ModelError
from slope_compile.export.detection import graph_form, own_answer, paste_masks


@torch.no_grad()
def both(model: nn.Module, batch: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    form = graph_form(model, tuple(batch.shape[1:]))
    answer: Any = own_answer(model, form)(batch)
    return form(batch), answer


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert torch.equal(ours["labels"], theirs["labels"])
    torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)  # pixels
    for name in set(ours) - {"labels", "boxes"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"masks": False},
        {"frozen_norms": True},
        {"conv_depth": 2},
        {"rpn_score_thresh": 0.6, "box_score_thresh": 0.4},
        {"rpn_pre_nms_top_n_test": 1000, "rpn_post_nms_top_n_test": 25},  # the coarse levels have fewer anchors
        {"rpn_pre_nms_top_n_test": 10, "rpn_post_nms_top_n_test": 200},  # suppression leaves fewer than asked for
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
        {"box_detections_per_img": 500},
        {"box_nms_thresh": 0.1, "rpn_nms_thresh": 0.3},
    ],
    ids=str,
)
def test_any_settings_give_torchvisions_answer(settings: dict[str, Any]) -> None:
    ours, theirs = both(detector(**settings), images(3))
    assert_same(ours, theirs)
    assert (theirs["scores"] > 0).sum() >= 3  # there was something to find


def test_scores_that_saturate_keep_torchvisions_order() -> None:
    model = detector()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(200)
        model.rpn.head.cls_logits.weight.mul_(200)
    ours, theirs = both(model, images(3))
    assert (theirs["scores"][:, :2] == 1).all()  # ties
    assert_same(ours, theirs)


@pytest.mark.parametrize("side", [48, 80])
def test_images_that_are_padded_inside_the_model(side: int) -> None:
    assert_same(*both(detector(min_size=side, max_size=side), images(2, side)))


def test_images_that_are_not_square() -> None:
    model = detector(min_size=64, max_size=96)
    assert_same(*both(model, images(2, 96)[:, :, :64]))


def test_a_blank_detector_finds_nothing_and_says_zeros() -> None:
    ours, theirs = both(detector(box_score_thresh=0.999), images(2))
    assert_same(ours, theirs)
    assert all(not value.any() for value in ours.values())


@torch.no_grad()
def test_it_is_what_the_model_returns_for_a_list_of_images() -> None:
    model, batch = detector(), images(2)
    ours = graph_form(model, tuple(batch.shape[1:]))(batch)
    for index, theirs in enumerate(model(list(batch))):
        count = len(theirs["scores"])
        found = {name: value[index, :count].numpy() for name, value in ours.items()}
        assert count and not ours["scores"][index, count:].any()
        assert np.array_equal(found["labels"], theirs["labels"])
        np.testing.assert_allclose(found["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(found["scores"], theirs["scores"], rtol=0, atol=1e-5)
        pasted = paste_masks(found["masks"], found["boxes"], SIDE, SIDE)
        np.testing.assert_allclose(pasted, theirs["masks"][:, 0], rtol=0, atol=1e-4)


def test_weights_keep_their_names_and_no_weight_is_copied() -> None:
    model = detector()
    form = graph_form(model, (3, SIDE, SIDE))
    assert {name: id(value) for name, value in form.named_parameters()} == {
        name: id(value) for name, value in model.named_parameters()
    }
    assert set(form.state_dict()) == set(model.state_dict())


def test_other_models_are_exported_as_they_are() -> None:
    model = nn.Linear(2, 2)
    assert graph_form(model, (2,)) is model
    assert own_answer(model, model) is model


def test_images_of_another_size_than_the_model_makes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"resizes images of 64 x 64") as caught:
        graph_form(detector(min_size=800, max_size=1333), (3, 64, 64))
    assert "min_size = (64,)" in caught.value.remedy
    with pytest.raises(ModelError, match="takes images"):
        graph_form(detector(), (3,))


def test_what_has_no_static_form_is_refused() -> None:
    adaptive = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 0)
    with pytest.raises(ModelError, match="sampling_ratio"):
        graph_form(detector(box_roi_pool=adaptive), (3, SIDE, SIDE))
    plain = detector(masks=False)
    keypoints = KeypointRCNN(
        plain.backbone, 2, rpn_anchor_generator=plain.rpn.anchor_generator, min_size=SIDE, max_size=SIDE
    )
    with pytest.raises(ModelError, match="keypoints"):
        graph_form(keypoints, (3, SIDE, SIDE))
    odd = detector()
    odd.roi_heads.box_predictor = nn.Identity()
    with pytest.raises(ModelError, match="cls_score"):
        graph_form(odd, (3, SIDE, SIDE))
