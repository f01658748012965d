"""All placements of one checkpoint have bit-identical dequantized weights: every placement, situation and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from placement_models import SITUATIONS, everywhere, export, layers_of, mlp, place, require_same_weights, run
from torch import nn

from slope_compile.compression.codes import CodedTensor
from slope_compile.placement.rules import PLACEMENTS

Exported = tuple[str, Path, dict[str, CodedTensor], np.ndarray, np.ndarray]


class Mixer(nn.Module):
    """Convolutions, one of them grouped, then matrix products over tokens: what ResNet-50 and DeiT-S are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.grouped = nn.Conv2d(8, 32, 3, groups=2)
        self.conv = nn.Conv2d(32, 96, 1)
        self.tokens = nn.Linear(96, 40)
        self.head = nn.Linear(40, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(torch.relu(self.grouped(torch.relu(self.stem(x))))))
        x = torch.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        answer: torch.Tensor = self.head(x).mean(1)
        return answer


MODELS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "mlp": (lambda: mlp(100, 192, 130, 10), (100,), {}),
    "mlp-a8": (lambda: mlp(100, 192, 130, 10), (100,), {"activation_bits": 8, "quantize_outputs": True}),
    "odd": (lambda: mlp(33, 7, 5, 3), (33,), {"overrides": {"0": {"bits": 4}, "4": {"bits": 3}}}),
    "mixer": (Mixer, (3, 15, 15), {"bits": 3, "first_last_bits": 4}),
    "mixer-a8": (Mixer, (3, 15, 15), {"activation_bits": 8, "overrides": {"conv": {"activation_bits": 4}}}),
}
# What some layer of each can become in some situation. Beside floats: 8 bits always, 4 bits where the codes are that
# narrow, which for a convolution is storage only, sparse FP16 where a layer of one group is 2:4 (none of
# `odd` has a multiple of 4 channels). Beside INT8 activations: nothing but INT8 products.
EXPECTED: dict[str, set[str]] = {
    "mlp": {"sparse-fp16", "int4-weight", "int8-weight", "float"},
    "mlp-a8": {"sparse-int8", "int8", "float"},
    "odd": {"int4-weight", "int8-weight", "float"},
    "mixer": {"sparse-fp16", "int4-weight", "int8-weight", "int4-storage", "float"},
    "mixer-a8": {"sparse-int8", "int8", "float"},
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    make, shape, settings = MODELS[request.param]
    model, path = make(), tmp_path_factory.mktemp(request.param) / "model.onnx"
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    codes = export(model, x, path, **settings)
    return request.param, path, codes, x.numpy(), run(path, x.numpy())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_holds_the_weights_of_the_checkpoint(
    exported: Exported, placement: str, tmp_path: Path
) -> None:
    name, model, codes, x, expected = exported
    layers = layers_of(model)
    tried: set[Any] = set()
    for number, one in enumerate(SITUATIONS):
        asked = everywhere(layers, placement, one)
        key = asked and (str(asked.overrides), asked.precision, asked.backend.name)
        if asked is None or key in tried:
            continue
        tried.add(key)
        placed, places = place(model, asked, tmp_path / str(number))
        assert {p.placement for p in places} >= {placement}
        require_same_weights(placed, codes, places)
        if one.precision == "fp32":  # zeros behind K and other orders of constants: the same sum, summed otherwise
            np.testing.assert_allclose(run(placed, x), expected, rtol=2e-5, atol=2e-6)
        elif one.precision == "fp16":
            np.testing.assert_allclose(run(placed, x), expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())
    assert bool(tried) is (placement in EXPECTED[name])


def test_a_model_reaches_the_placements_that_it_should(exported: Exported) -> None:
    layers = layers_of(exported[1])
    reached = {p for p in PLACEMENTS for one in SITUATIONS if everywhere(layers, p, one) is not None}
    assert reached == EXPECTED[exported[0]]


def test_together_the_models_reach_every_placement() -> None:
    assert set(EXPECTED) == set(MODELS)
    assert set().union(*EXPECTED.values()) == set(PLACEMENTS)
