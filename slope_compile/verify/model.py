"""All checks over one ONNX model: the verification itself, whatever the files come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slope_compile.codes_file import load_codes
from slope_compile.compression.codes import CodedTensor
from slope_compile.events import Events
from slope_compile.qdq.activations import stored_quantizers
from slope_compile.qdq.reader import coded_weights
from slope_compile.verify.allowed import of_engine, of_outputs
from slope_compile.verify.digests import Digests, check_digests
from slope_compile.verify.engine import EngineUnderTest, check_engine
from slope_compile.verify.golden import read_golden
from slope_compile.verify.metric import MetricTask, check_metric
from slope_compile.verify.parity import check_default, check_onnx, named
from slope_compile.verify.placed import check_placed
from slope_compile.verify.runners import Arrays, default_session, random_feed, reference_session
from slope_compile.verify.steps import step_problems
from slope_compile.verify.tolerance import Tolerance, tolerance_of
from slope_compile.verify.verdict import Check, Once, T, Verdict, attempt
from slope_compile.verify.weights import check_codes, check_pattern

if TYPE_CHECKING:
    from torch import nn

    Model = nn.Module | Callable[[], nn.Module]


def verify_model(
    onnx: Path,
    *,
    codes: Path | Mapping[str, CodedTensor] | None = None,
    model: Model | None = None,
    golden: Path | None = None,
    samples: Sequence[Arrays] | None = None,
    engine: EngineUnderTest | None = None,
    placed: Path | None = None,
    metric: MetricTask | Callable[[], MetricTask] | None = None,
    digests: Digests | None = None,
    allowed: Tolerance | None = None,
    events: Events | None = None,
) -> Verdict:
    """Run every check, in order, whatever the earlier ones found.

    What a check needs is loaded when it asks for it, so that a damaged file fails those checks that read it, no others.
    What is not given leaves its checks `not checked`.

    Args:
        onnx: The ONNX file; external data beside it.
        codes: The checkpoint's coded tensors, or their file.
        model: The trained model with its parametrizations, or what loads it. Its mode is left as it was.
        golden: Inputs and outputs kept by export.
        samples: Further inputs for parity: ONNX input name -> array, batch first. None: random ones of the file's own
            input shape where there are no golden ones.
        engine: An engine built from the file.
        placed: The ONNX file that the build made of it for the engine.
        metric: The validation split and the accuracies to compare with, or what prepares them.
        digests: How the files compare with their manifest.
        allowed: How far the engine's outputs may be off; None: derived here.
        events: Told how far the verification is.
    """
    told = events or Events()
    session = Once(lambda: reference_session(onnx))
    weights = Once(lambda: coded_weights(onnx))
    quantizers = Once(lambda: stored_quantizers(onnx))
    tolerance = Once(lambda: of_outputs(tolerance_of(weights()), onnx, weights(), quantizers(), feeds()))
    engine_tolerance = Once(lambda: allowed or of_engine(onnx, weights(), quantizers(), feeds(), placed))
    expected = (
        None
        if codes is None
        else _once(codes, cast(Any, lambda: load_codes(cast(Path, codes))), isinstance(codes, Path))
    )
    trained = None if model is None else _once(model, cast(Any, model), not hasattr(model, "named_modules"))
    kept = None if golden is None else Once(lambda: named(read_golden(golden), onnx))
    task = None if metric is None else _once(metric, cast(Any, metric), not isinstance(metric, MetricTask))

    def further() -> Sequence[Arrays]:
        if samples is None:
            return [] if kept is not None or trained is None else [random_feed(session())]
        return samples

    def feeds() -> list[Arrays]:
        return [*([kept().inputs] if kept is not None else []), *further()]

    def steps(model: nn.Module, inputs: Sequence[Arrays], figures: dict[str, Any]) -> list[str] | None:
        return step_problems(onnx, model, session(), inputs, tolerance_of(weights()), figures)

    def share(done: float) -> None:
        told.progress("verify", len(checks) + done, len(checks_by_name), "metric")

    checks_by_name: dict[str, Callable[[], Check]] = {
        "digest": lambda: check_digests(digests),
        "pattern": lambda: check_pattern(weights, expected),
        "codes": lambda: check_codes(weights, expected, trained, quantizers),
        "parity.onnx": lambda: check_onnx(session, tolerance, trained, kept, further, steps),
        "parity.onnx-default": lambda: check_default(session, lambda: default_session(onnx), feeds()),
        "parity.placed": lambda: check_placed(placed, onnx, session, weights, quantizers, feeds),
        "parity.engine": lambda: check_engine(engine, onnx, session, engine_tolerance, feeds, kept),
        "metric": lambda: check_metric(task, session, trained, share),
    }
    checks: list[Check] = []
    for name, step in checks_by_name.items():
        told.progress("verify", len(checks), len(checks_by_name), name)
        checks.append(attempt(name, step))
        told.emit("check", name=name, status=checks[-1].status, detail=checks[-1].detail)
    told.progress("verify", len(checks_by_name), len(checks_by_name))
    return Verdict(tuple(checks))


def _once(given: Any, load: Callable[[], T], must_load: bool) -> Once[T]:
    """Return a value that is there already, or one to be loaded, behind the same call."""
    return Once(load if must_load else lambda: cast(T, given))
