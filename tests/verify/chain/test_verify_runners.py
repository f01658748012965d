from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from polygraphy.logger import G_LOGGER
from torch import nn
from verify_twins import CHANNELS, SIDE, make_twin

from slope_compile.verify.chain.runners import TorchRunner, infer, infer_onnx, quiet, random_feed, reference_session
from slope_compile.verify.parity.outputs import Difference, compare
from slope_compile.verify.parity.tolerance import Tolerance

EXACT, LOOSE = Tolerance(0.0, "exact"), Tolerance(0.1, "loose")


@pytest.fixture
def session(tmp_path: Path) -> ort.InferenceSession:
    return reference_session(make_twin().write(tmp_path / "m.onnx"))


def test_torch_and_onnx_runtime_give_named_outputs_for_each_feed(session: ort.InferenceSession) -> None:
    feeds = [{"input": np.full((n, CHANNELS, SIDE, SIDE), n, np.float32)} for n in (1, 3)]
    model = make_twin().model()
    from_torch, from_onnx = infer(TorchRunner(model, session), feeds), infer_onnx(session, feeds, "onnx")
    for feed, a, b in zip(feeds, from_torch, from_onnx, strict=True):
        assert list(a) == list(b) == ["output"]
        with torch.no_grad():
            np.testing.assert_array_equal(a["output"], model(torch.from_numpy(feed["input"])).numpy())
        np.testing.assert_allclose(a["output"], b["output"], rtol=1e-4, atol=1e-5)


def test_the_model_is_run_in_eval_mode_and_left_in_its_own(session: ort.InferenceSession) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twin, self.drop = make_twin().model(), nn.Dropout(0.9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.drop(self.twin(x))
            return answer

    model = Moody().train()
    model.twin.conv1.eval()
    before = [module.training for module in model.modules()]
    feed = random_feed(session)
    assert compare(infer_onnx(session, [feed], "onnx"), infer(TorchRunner(model, session), [feed]), LOOSE).within
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("form", ["list", "dict", "nested"])
def test_answers_of_several_tensors_are_taken_in_order(form: str, session: ort.InferenceSession) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            answer = x.mean((2, 3))
            return {"list": [answer], "dict": {"logits": answer}, "nested": ({"a": [answer]},)}[form]

    (outputs,) = infer(TorchRunner(Wrapped(), session), [random_feed(session)])
    assert list(outputs) == ["output"]


def test_another_number_of_outputs_is_an_error(session: ort.InferenceSession) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with pytest.raises(ValueError, match="2 tensors, the ONNX model 1"):
        infer(TorchRunner(Two(), session), [random_feed(session)])


def test_polygraphy_is_silent_and_keeps_its_own_level(capfd: pytest.CaptureFixture[str]) -> None:
    before = G_LOGGER.module_severity.get()
    with quiet():
        G_LOGGER.error("an error")
        G_LOGGER.info("a line")
    assert capfd.readouterr() == ("", "")
    assert G_LOGGER.module_severity.get() == before


def difference(reference: list[list[float]], tested: list[list[float]], tolerance: Tolerance) -> Difference:
    return compare([{"y": np.asarray(reference, np.float32)}], [{"y": np.asarray(tested, np.float32)}], tolerance)


def test_the_difference_is_relative_to_the_largest_output() -> None:
    found = difference([[4.0, 0.0], [-8.0, 1.0]], [[4.0, 0.4], [-8.0, 1.0]], LOOSE)
    assert found.within
    assert found.max_abs == pytest.approx(0.4) and found.relative == pytest.approx(0.05)
    assert not difference([[4.0, 0.0], [-8.0, 1.0]], [[4.0, 0.9], [-8.0, 1.0]], LOOSE).within
    assert not difference([[4.0, 0.0]], [[4.0, 1e-30]], EXACT).within
    assert difference([[4.0, 0.0]], [[4.0, 0.0]], EXACT).within


def test_one_element_outside_is_enough_however_many_are_inside() -> None:
    reference = np.ones((1000, 10), np.float32)
    tested = reference.copy()
    tested[777, 7] = 1.2
    assert not compare([{"y": reference}], [{"y": tested}], LOOSE).within


def test_top1_agreement_counts_samples() -> None:
    reference, tested = (
        [[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]],
        [[1.0, 2.0], [3.0, 0.0], [1.0, 0.0], [5.0, 4.0]],
    )
    assert difference(reference, tested, LOOSE).top1 == 0.75
    assert compare([{"y": np.ones((2, 3, 4))}], [{"y": np.ones((2, 3, 4))}], EXACT).top1 is None


def test_cosine_of_opposite_outputs_is_minus_one() -> None:
    assert difference([[1.0, 2.0]], [[-1.0, -2.0]], LOOSE).cosine == pytest.approx(-1)
    assert difference([[0.0, 0.0]], [[0.0, 0.0]], EXACT).cosine == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_never_compare_equal(bad: float) -> None:
    with pytest.raises(ValueError, match="1 NaN or infinite values of 2"):
        difference([[1.0, bad]], [[1.0, bad]], LOOSE)


def test_names_and_shapes_must_be_the_same() -> None:
    one = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="named z"):
        compare([{"y": one}], [{"z": one}], LOOSE)
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        compare([{"y": one}], [{"y": one.T}], LOOSE)


def test_the_rooms_modules_import_without_torch() -> None:
    modules = "slope_compile.verify.run, slope_compile.verify.parity.worker, slope_compile.verify.files"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
