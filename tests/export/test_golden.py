from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.numpy
import torch
from torch import nn

from slope_compile.errors import ModelError
from slope_compile.export.golden import golden_outputs, write_golden
from slope_compile.verify.chain.golden import read_golden


class Returns(nn.Module):
    def __init__(self, make: object) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> object:
        return self.make(x)


def test_many_samples_go_through_in_chunks() -> None:
    sizes = []
    inputs = torch.randn(70, 3)
    outputs = golden_outputs(Returns(lambda x: sizes.append(len(x)) or x * 2), inputs)
    assert list(outputs) == ["output"]
    assert torch.equal(outputs["output"], inputs * 2)
    assert max(sizes) == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x, x), "returns tuple"),
        (lambda x: {"logits": x.sum()}, r"returns a tensor \[\] as 'logits'"),
        (lambda x: {"logits": [x]}, "returns list as 'logits'"),
        (lambda x: {}, "dict without names or tensors"),
        (lambda x: {1: x}, "dict without names or tensors"),
        (lambda x: x.sum(), r"returns a tensor \[\]"),
        (lambda x: x[:1], r"returns a tensor \[1, 3\]"),
        (lambda x: x / 0, "NaN or infinity"),
    ],
)
def test_what_is_no_batch_of_answers_is_refused(make: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        golden_outputs(Returns(make), torch.ones(4, 3))


def test_the_file(tmp_path: Path) -> None:
    inputs, outputs = torch.randn(4, 3).T, torch.randn(3, 2)
    write_golden(tmp_path / "g.safetensors", inputs, {"output": outputs})
    golden = safetensors.numpy.load_file(tmp_path / "g.safetensors")
    assert golden.keys() == {"inputs", "outputs"}
    assert (golden["inputs"] == inputs.numpy()).all() and (golden["outputs"] == outputs.numpy()).all()


def test_several_outputs_are_kept_by_name(tmp_path: Path) -> None:
    inputs = torch.randn(3, 2)
    outputs = golden_outputs(Returns(lambda x: {"logits": x, "size": x.abs().sum(1).long()}), inputs)
    write_golden(tmp_path / "g.safetensors", inputs, outputs)
    golden = safetensors.numpy.load_file(tmp_path / "g.safetensors")
    assert golden.keys() == {"inputs", "outputs.logits", "outputs.size"}
    assert (golden["outputs.logits"] == inputs.numpy()).all() and golden["outputs.size"].dtype == "float32"
    kept = read_golden(tmp_path / "g.safetensors")
    assert list(kept.outputs) == ["logits", "size"] and kept.outputs["size"].shape == (3,)
