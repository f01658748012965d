from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

import slope_compile as sc
from benchmarks.ablation.__main__ import main
from benchmarks.ablation.arms import Arm, compress, compressed, main_arms, penalty, study_arms, tighten, tuning_arms
from benchmarks.ablation.glyphs import CLASSES, SIDE, alphabet, draw
from benchmarks.ablation.network import network
from benchmarks.ablation.summary import summarize


def test_images_repeat_by_seed_and_differ_between_seeds() -> None:
    drawings = alphabet()
    images, labels = draw(drawings, 256, 3)
    again, same_labels = draw(drawings, 256, 3)
    other, _ = draw(drawings, 256, 4)
    assert images.shape == (256, 1, SIDE, SIDE)
    assert torch.equal(images, again) and torch.equal(labels, same_labels)
    assert not torch.equal(images, other)
    assert len(drawings) == CLASSES and len(drawings.unique(dim=0)) == CLASSES


def test_the_arms_are_those_of_the_question() -> None:
    names = [arm.name for arm in main_arms()]
    assert names[0] == "dense"
    assert set(names[1:]) == {f"{p} W{b}" for p in ("none", "l2", "sr-ste", "cosine") for b in (4, 3, 2)}
    every = [*names, *(arm.name for arm in study_arms())]
    assert len(set(every)) == len(every)
    assert len({arm.name for arm in tuning_arms()}) == len(tuning_arms())


def test_a_masked_gradient_spares_pruned_weights() -> None:
    model = network(CLASSES)
    compress(model, Arm("a", 2, masked=True))
    images, labels = draw(alphabet(), 8, 0)
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    pruned = dense = 0.0
    for _, layer, slope in compressed(model):
        latent = layer.parametrizations["weight"].original
        mask = slope.mask(latent)
        if mask is not None:
            pruned += float(latent.grad[~mask].abs().sum())
            dense += float(latent.grad[mask].abs().sum())
    assert pruned == 0 and dense > 0


def test_the_bound_decays_pruned_weights_at_one_rate() -> None:
    """d/dw of the sum of ‖w‖²(1 - cos), ‖w‖ fixed, is cos * w at a pruned weight (facts: cos * w / ‖w‖² times ‖w‖²)."""
    model = network(CLASSES)
    arm = Arm("a", 4, "bound", strength=1.0)
    compress(model, arm)
    penalty(model, arm, 0.0).backward()
    for _, layer, slope in compressed(model):
        w = layer.parametrizations["weight"].original
        mask = slope.mask(w)
        if mask is None:
            continue
        cosine = torch.nn.functional.cosine_similarity(w.flatten(1), layer.weight.flatten(1)).view(-1, 1, 1, 1)
        assert torch.allclose(w.grad[~mask], (cosine * w)[~mask], rtol=1e-4, atol=1e-6)


def test_a_gradual_arm_ends_where_the_others_are() -> None:
    for kind in ("pattern", "bits"):
        model, plain = network(CLASSES), network(CLASSES)
        plain.load_state_dict(model.state_dict())
        arm = Arm("a", 2, gradual=kind)  # type: ignore[arg-type]
        compress(model, arm)
        compress(plain, Arm("b", 2))
        tighten(model, arm, 0.0)
        assert any(s.bits == 8 or s.pattern == (4, 4) for _, _, s in compressed(model))
        for done in (0.2, 0.3, 0.5, 1.0):
            tighten(model, arm, done)
        assert [(s.bits, s.pattern) for _, _, s in compressed(model)] == [
            (s.bits, s.pattern) for _, _, s in compressed(plain)
        ]


def test_a_ramp_has_the_strength_s_mean() -> None:
    model = network(CLASSES)
    arm = Arm("a", 2, "cosine", ramp="up")
    compress(model, arm)
    with parametrize.cached():
        values = [float(penalty(model, arm, done / 100).detach()) for done in range(101)]
        assert values[0] == 0 and math.isclose(sum(values) / 101, float(sc.penalty(model).detach()), rel_tol=1e-5)


def test_paired_differences_and_their_interval() -> None:
    accuracies = {"none W2": [0.80, 0.82, 0.78], "cosine W2": [0.81, 0.835, 0.785]}
    rows = [
        {"seed": seed, "arm": arm, "fp32": 0.9, "accuracy": a, "cosine": 0.9, "sqnr_db": 8.0, "density": 0.4}
        for arm, values in accuracies.items()
        for seed, a in enumerate(values)
    ]
    figures = summarize(rows)["cosine W2"]["against none W2"]
    assert figures == {"mean": 1.0, "seeds": 3, "ci95": 1.24}  # 1, 1.5, .5: sd .5; t(.975, 2) = 4.303; 4.303 * .5 / √3


@pytest.mark.e2e
def test_the_documented_command_at_smoke_scale(tmp_path: Path) -> None:
    out = tmp_path / "ablation.json"
    arguments = ["--scale", "smoke", "--seeds", "0", "--out", str(out)]
    main(arguments)
    document = json.loads(out.read_text())
    assert [row["arm"] for row in document["rows"]] == sorted(arm.name for arm in main_arms())
    assert set(document["summary"]) == {arm.name for arm in main_arms()}
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    before = out.stat().st_mtime_ns
    main(arguments)  # nothing is missing: nothing is trained
    assert out.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="another scale"):
        main(["--scale", "small", "--seeds", "0", "--out", str(out)])
