from __future__ import annotations

import torch
from torch import nn

from slope_compile.compression.api import compress
from slope_compile.train.direction import EDGES, direction_counts, direction_record


def test_before_training_the_histogram_is_that_of_the_pretrained_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 1], [7, 1, 0, 0, 0, 0, 7, 0], [0.0] * 8]))
    compress(model, bits=8, first_last_bits=None, overrides={"1": "off"})
    # Half of the equal weights go: cos = sqrt(1/2). Of the second, the mask takes nothing. The third points nowhere.
    found = direction_counts(model)
    assert found["zero"] == 1 and sum(found["counts"]) == 2
    low, high = (index for index, count in enumerate(found["counts"]) if count)
    assert EDGES[low] <= 0.5**0.5 < EDGES[low + 1] and EDGES[high + 1] == 1.0


def test_a_model_without_compressed_layers_counts_nothing() -> None:
    assert direction_counts(nn.Linear(4, 4)) == {"counts": [0] * 200, "zero": 0}


def test_a_state_of_before_this_record_leaves_before_open() -> None:
    record = direction_record(None, {"counts": [1, 2], "zero": 0})
    assert record["before"] is None and record["zero"] == {"before": None, "after": 0}
    assert record["after"] == [1, 2]
