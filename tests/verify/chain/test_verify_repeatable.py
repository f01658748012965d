"""`repeatable`: dropout left on, batch norms in training mode and random nodes are found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F
from verify_twins import CHANNELS, CLASSES, HIDDEN, SIDE, TwinModel, make_twin, node

from slope_compile.verify.chain.places import Chain
from slope_compile.verify.chain.repeatable import check_repeatable
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import Once, Verdict

LATER = ["parity.onnx", "parity.onnx-default", "agreement"]


def statuses(verdict: Verdict, *names: str) -> list[str]:
    return [verdict[name].status for name in names]


class Awake(nn.Dropout):
    """Ignores eval()."""

    def train(self, mode: bool = True) -> Awake:
        super().train(True)
        return self


class AwakeNorm(nn.BatchNorm2d):
    """Ignores eval()."""

    def train(self, mode: bool = True) -> AwakeNorm:
        super().train(True)
        return self


class With(nn.Module):
    """The twin with something before it."""

    def __init__(self, first: nn.Module | Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.twin = first, make_twin().model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.twin(self.first(x))
        return answer


class Counting(nn.Module):
    """Answers otherwise at every call, without drawing anything."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        answer: torch.Tensor = x * self.calls
        return answer


class Averaging(nn.Module):
    """A functional batch norm whose running mean goes on running."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("variance", torch.ones(CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = F.batch_norm(x, self.mean, self.variance)
        self.mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return answer


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (Awake(0.3), "module 'first' draws random numbers (aten."),
        (lambda x: F.dropout(x, 0.3), "the forward of With draws random numbers (aten."),
        (lambda x: x + torch.randn_like(x), "(aten.randn_like"),
        (Counting(), "module 'first' changes its 'calls' with each call"),
        (Averaging(), "module 'first' changes its 'mean' with each call"),
    ],
    ids=["dropout that ignores eval", "functional dropout", "noise", "state", "functional batch norm"],
)
def test_a_model_that_answers_otherwise_each_time_fails_and_is_compared_with_nothing(
    first: Any, words: str, tmp_path: Path
) -> None:
    model = With(first).train()
    verdict = verify_model(make_twin().write(tmp_path / "m.onnx"), model=model)
    found = verdict["repeatable"]
    assert found.status == "fail"
    assert "the trained model does not answer the same twice" in found.detail and words in found.detail
    assert found.figures["onnx"]["bit_equal"] is True
    assert statuses(verdict, "parity.onnx", "agreement") == ["not checked", "not checked"]
    assert words in verdict["parity.onnx"].detail
    assert verdict["parity.onnx-default"].status == "pass"  # the file itself is sound
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (AwakeNorm(CHANNELS), "module 'first' normalizes with the batch's own statistics (aten."),
        (nn.BatchNorm2d(CHANNELS, track_running_stats=False), "module 'first' normalizes with the batch's"),
        (lambda x: x - x.mean(0, keepdim=True), "does it mix the samples of a batch?"),
    ],
    ids=["ignores eval", "no running statistics", "mean over the batch"],
)
def test_a_model_whose_answer_depends_on_the_batch_fails(norm: Any, words: str, tmp_path: Path) -> None:
    model = With(norm).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = verify_model(make_twin().write(tmp_path / "m.onnx"), model=model)["repeatable"]
    assert found.status == "fail"
    assert "a sample alone otherwise than in a batch" in found.detail and words in found.detail
    assert found.figures["trained"]["alone"] > found.figures["trained"]["tolerance"]
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("first", [nn.Dropout(0.5), nn.InstanceNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)])
def test_a_sound_model_in_training_mode_is_no_fault(first: nn.Module, tmp_path: Path) -> None:
    model = With(first).train()
    found = verify_model(make_twin().write(tmp_path / "m.onnx"), model=model)["repeatable"]
    assert found.status == "pass", found.detail
    assert found.figures["trained"]["bit_equal"] is True and found.figures["samples"] == 4
    assert model.training


@pytest.mark.parametrize(
    ("first", "status"),
    [(Awake(0.01), "fail"), (AwakeNorm(CHANNELS), "fail"), (lambda x: x - 1e-3 * x.mean(0), "pass")],
    ids=["dropout", "norm", "rounding, perhaps"],
)
def test_what_rounding_may_move_as_far_needs_a_cause(first: Any, status: str, tmp_path: Path) -> None:
    """Quantized activations: the outputs may move by nearly anything, so only what was found convicts."""
    path, model = make_twin().write(tmp_path / "m.onnx"), With(first).train()
    widened, floats = (Once(lambda size=size: Tolerance(size, "")) for size in (0.99, 1e-6))
    found = check_repeatable(Chain(path, Once(lambda: model), None, None), widened, floats)
    assert found.status == status, found.detail
    assert status == "pass" or "module 'first'" in found.detail


def test_a_norm_that_refuses_a_lone_sample_is_named(tmp_path: Path) -> None:
    class Awake1d(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Awake1d:
            super().train(True)
            return self

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twin, self.norm = make_twin().model(), Awake1d(CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.norm(self.twin(x))
            return answer

    found = verify_model(make_twin().write(tmp_path / "m.onnx"), model=Net())["repeatable"]
    assert found.status == "fail"
    assert "does not run a sample alone (module 'norm' normalizes" in found.detail
    assert "more than 1 value per channel" in found.detail


def dropout(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(0.3, np.float32), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "on"))
    insert(model, helper.make_node("Dropout", ["c", "ratio", "on"], ["c2"], "left_on"))


def computed_dropout(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(0.3, np.float32), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(False), "off"))
    nodes = [
        helper.make_node("Not", ["off"], ["on"], "not"),
        helper.make_node("Dropout", ["c", "ratio", "on"], ["c2"], "asked"),
    ]
    insert(model, *nodes)


def noise(model: onnx.ModelProto) -> None:
    insert(
        model,
        helper.make_node("RandomNormalLike", ["c"], ["r"], "noise", seed=1.0),
        helper.make_node("Add", ["c", "r"], ["c2"], "add"),
    )


def batch_norm(model: onnx.ModelProto) -> None:
    for name in ("one", "zero", "mean", "var"):
        values = np.zeros(HIDDEN, np.float32) if name in ("zero", "mean") else np.ones(HIDDEN, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    inputs = ["c", "one", "zero", "mean", "var"]
    outputs = ["c2", "next_mean", "next_var"]
    insert(model, helper.make_node("BatchNormalization", inputs, outputs, "norm", training_mode=1))


def batch_mean(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([0], np.int64), "axes"))
    insert(
        model,
        helper.make_node("ReduceMean", ["c", "axes"], ["mean"], "over_batch"),
        helper.make_node("Sub", ["c", "mean"], ["c2"], "sub"),
    )


def insert(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Put nodes that make `c2` of `c` before the pool."""
    pool = node(model, "pool")
    pool.input[0] = "c2"
    place = list(model.graph.node).index(pool)
    for offset, one in enumerate(nodes):
        model.graph.node.insert(place + offset, one)


@pytest.mark.parametrize(
    ("edit", "words", "steady"),
    [
        (dropout, "node 'left_on' (Dropout) is in training mode", False),
        (computed_dropout, "node 'asked' (Dropout) may be in training mode: 'on' is computed", False),
        (noise, "node 'noise' (RandomNormalLike) draws random numbers", False),
        (batch_norm, "node 'norm' (BatchNormalization) is in training mode", True),
        (batch_mean, "node 'over_batch' (ReduceMean) reduces over the batch", True),
    ],
)
@pytest.mark.parametrize("given", ["model", "golden", "nothing"])
def test_a_file_in_training_mode_fails_and_the_node_is_named(
    edit: Callable[[onnx.ModelProto], None], words: str, steady: bool, given: str, tmp_path: Path
) -> None:
    twin = make_twin()
    path = twin.write(tmp_path / "m.onnx", edit)
    model = twin.model() if given == "model" else None
    verdict = verify_model(path, model=model, golden=twin.golden(tmp_path / "g") if given == "golden" else None)
    assert verdict["repeatable"].status == "fail"
    assert words in verdict["repeatable"].detail
    if not steady and given != "nothing":
        assert statuses(verdict, *LATER) == ["not checked"] * 3
        assert words in verdict["parity.onnx"].detail


@pytest.mark.parametrize(
    ("edit", "status", "words"),
    [
        (dropout, "fail", "node 'left_on' (Dropout) is in training mode"),
        (noise, "fail", "node 'noise' (RandomNormalLike) draws random numbers"),
        (batch_norm, "fail", "node 'norm' (BatchNormalization) is in training mode"),
        (batch_mean, "not checked", "is not run without samples"),  # a sound one may do that
        (None, "not checked", "is not run without samples"),
    ],
)
def test_a_big_lone_file_is_examined_and_not_run(
    edit: Callable[[onnx.ModelProto], None] | None, status: str, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("slope_compile.verify.chain.repeatable.RUN_ALONE", 1000)
    monkeypatch.setattr("slope_compile.verify.chain.places.reference_session", lambda _: pytest.fail("it was loaded"))
    verdict = verify_model(make_twin().write(tmp_path / "m.onnx", edit))
    assert (verdict["repeatable"].status, verdict.verdict) == (status, "fail")
    assert words in verdict["repeatable"].detail


def test_a_lone_file_that_answers_the_same_twice_is_not_yet_verified(tmp_path: Path) -> None:
    verdict = verify_model(make_twin().write(tmp_path / "m.onnx"))
    found = verdict["repeatable"]
    assert (found.status, verdict.verdict) == ("not checked", "fail")
    assert "on made-up inputs ONNX Runtime answers the same twice" in found.detail


def test_one_golden_sample_is_enough_to_see_a_dependence_on_the_batch(tmp_path: Path) -> None:
    twin = make_twin()
    golden = twin.golden(tmp_path / "g", samples=1)
    assert verify_model(twin.write(tmp_path / "m.onnx"), golden=golden)["repeatable"].status == "pass"
    assert verify_model(twin.write(tmp_path / "n.onnx", batch_norm), golden=golden)["repeatable"].status == "fail"


def test_a_fixed_batch_is_run_twice_only(tmp_path: Path) -> None:
    def fix(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5

    twin = make_twin()
    golden = twin.golden(tmp_path / "g")
    found = verify_model(twin.write(tmp_path / "m.onnx", fix), model=twin.model(), golden=golden)["repeatable"]
    assert found.status == "pass" and "no sample ran alone" in found.detail
    assert found.figures["samples"] is None


def test_nan_of_the_trained_model_fails_in_words(tmp_path: Path) -> None:
    model = make_twin().model()
    with torch.no_grad():
        model.fc.bias[2] = torch.nan
    verdict = verify_model(make_twin().write(tmp_path / "m.onnx"), model=model)
    assert "the trained model: output 'output' has 4 NaN or infinite values of 24" in verdict["repeatable"].detail


def save(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: dict[str, Any]) -> Path:
    """Write a model of floats; `inputs` and `outputs`: name -> (type, shape)."""
    values = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in some.items()]
        for some in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "foreign", *values)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path


F32, I64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.mark.parametrize(
    ("nodes", "inputs", "outputs"),
    [
        (
            [helper.make_node("Add", ["a", "b"], ["y"])],
            {"a": (F32, ["n", 3]), "b": (F32, ["n", 3])},
            {"y": (F32, None)},
        ),
        ([helper.make_node("Identity", ["a"], ["y"])], {"a": (I64, ["n", "t"])}, {"y": (I64, ["n", "t"])}),
        ([helper.make_node("Relu", ["a"], ["y"])], {"a": (F32, ["n", 3, "h", "w"])}, {"y": (F32, None)}),
        ([helper.make_node("Log", ["a"], ["y"])], {"a": (F32, ["n", 3])}, {"y": (F32, ["n", 3])}),
        ([helper.make_node("Abs", ["a"], ["y"])], {"a": (F32, [])}, {"y": (F32, [])}),
        ([helper.make_node("Shape", ["a"], ["y"])], {"a": (F32, ["n", 3])}, {"y": (I64, [2])}),
        ([helper.make_node("NonZero", ["a"], ["y"])], {"a": (F32, ["n", 3])}, {"y": (I64, None)}),
        ([helper.make_node("Greater", ["a", "a"], ["y"])], {"a": (F32, ["n", 3])}, {"y": (TensorProto.BOOL, None)}),
    ],
    ids=["two inputs", "integers", "free axes", "NaN", "scalar", "shape", "free rows", "booleans"],
)
def test_files_of_other_tools_are_never_a_traceback(
    nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: dict[str, Any], tmp_path: Path
) -> None:
    verdict = verify_model(save(tmp_path / "m.onnx", nodes, inputs, outputs), out=tmp_path / "out")
    assert {check.status for check in verdict.checks} == {"not checked"}
    kinds = {F32: np.float32, I64: np.int64}
    feed = {
        name: np.ones([2 if isinstance(length, str) else length for length in shape], kinds[kind])
        for name, (kind, shape) in inputs.items()
    }
    with_samples = verify_model(tmp_path / "m.onnx", samples=[feed], out=tmp_path / "more")
    assert with_samples["repeatable"].status == with_samples["parity.onnx-default"].status == "pass"


def test_the_twin_has_the_shapes_that_these_tests_take() -> None:
    assert TwinModel()(torch.zeros(2, CHANNELS, SIDE, SIDE)).shape == (2, CLASSES)
