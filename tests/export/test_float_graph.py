from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from slope_compile.errors import ModelError
from slope_compile.export.float_graph import float_graph, frozen_copy


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(2, 4)


class DependsOnData(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


class MovesTheBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("a print of the model's own")  # noqa: T201
        warnings.warn("a warning of the model's own", stacklevel=1)
        return x.transpose(0, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (FixedBatch(), r"FixedBatch exports 'input' as \[2, 4\], not as \[batch, 4…\]"),
        (DependsOnData(), "cannot export DependsOnData with a dynamic batch"),
        (MovesTheBatch(), r"MovesTheBatch exports 'output' as \[4, batch\]"),
    ],
)
def test_models_without_a_dynamic_batch_are_refused(
    model: nn.Module, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        float_graph(model, (4,), 21)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


def test_a_frozen_copy_shares_nothing_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    copy = frozen_copy(model)
    copy[0].weight.data.zero_()
    assert model.training and not copy.training
    assert model[0].weight.abs().sum() > 0
