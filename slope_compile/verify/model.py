"""All checks over one ONNX model: the verification itself, whatever the files come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slope_compile.codes_file import StoredCodes
from slope_compile.compression.codes import CodedTensor
from slope_compile.events import Events
from slope_compile.qdq.activations import stored_quantizers
from slope_compile.qdq.reader import coded_weights, iter_weights
from slope_compile.verify.chain.places import ENGINE, ONNX, Chain
from slope_compile.verify.chain.repeatable import check_repeatable
from slope_compile.verify.chain.runners import Arrays
from slope_compile.verify.chain.saved import save_chain
from slope_compile.verify.laws.check import Declared, check_codes, check_pattern
from slope_compile.verify.laws.digests import Digests, check_digests
from slope_compile.verify.laws.files import Artifacts
from slope_compile.verify.laws.layer_list import LayerList
from slope_compile.verify.layerwise import Layerwise
from slope_compile.verify.metric.check import MetricTask, check_metric
from slope_compile.verify.parity.agreement import check_agreement
from slope_compile.verify.parity.allowed import of_default, of_engine, of_file, of_outputs
from slope_compile.verify.parity.engine import EngineUnderTest, check_engine
from slope_compile.verify.parity.hops import check_default, check_folded, check_onnx
from slope_compile.verify.parity.operators import unknown_operators
from slope_compile.verify.parity.placed import check_placed
from slope_compile.verify.parity.steps import step_problems
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import Check, NotCheckedError, Once, T, Verdict, attempt

if TYPE_CHECKING:
    from torch import nn

    Model = nn.Module | Callable[[], nn.Module]


def verify_model(
    onnx: Path,
    *,
    codes: Path | Mapping[str, CodedTensor] | None = None,
    declared: Callable[[], Mapping[str, Declared]] | None = None,
    model: Model | None = None,
    golden: Path | None = None,
    samples: Sequence[Arrays] | None = None,
    engine: EngineUnderTest | None = None,
    placed: Path | None = None,
    metric: MetricTask | Callable[[], MetricTask] | None = None,
    digests: Digests | None = None,
    allowed: Tolerance | None = None,
    engine_layers: Callable[[], Check] | None = None,
    layers: Path | None = None,
    packed: Callable[[], Check] | None = None,
    out: Path | None = None,
    events: Events | None = None,
) -> Verdict:
    """Run every check, in order, whatever the earlier ones found.

    What a check needs is loaded when it asks for it, so that a damaged file fails those checks that read it, no others.
    What is not given leaves its checks `not checked`.

    Args:
        onnx: The ONNX file; external data beside it.
        codes: The checkpoint's coded tensors, or their file.
        declared: Gives the bits and pattern of each weight where there are no coded tensors.
        model: The trained model with its parametrizations, or what loads it. Its mode is left as it was.
        golden: Inputs and outputs kept by export.
        samples: Further inputs for parity: ONNX input name -> array, batch first. None: random ones of the file's own
            input shape where there are no golden ones.
        engine: An engine built from the file.
        placed: The ONNX file that the build made of it for the engine.
        metric: The validation split and the accuracies to compare with, or what prepares them.
        digests: How the files compare with their manifest.
        allowed: How far the engine's outputs may be off; None: derived here.
        engine_layers: `engine.layers`: what the engine holds against what was placed; None: nothing was built.
        layers: The export's layer list; None: there need be none.
        packed: `packed`: what the packed file holds; None: nothing was packed.
        out: Where the runs of the chain, the layers' errors and reproducers are written; None: nowhere.
        events: Told how far the verification is.

    Raises:
        StorageError: If `out` cannot be written.
    """
    told = events or Events()
    trained = None if model is None else _once(model, cast(Any, model), not hasattr(model, "named_modules"))
    chain = Chain(onnx, trained, golden, samples)
    weights = Once(lambda: coded_weights(onnx))
    quantizers = Once(lambda: stored_quantizers(onnx))
    floats = Once(lambda: of_file(onnx))
    tolerance = Once(lambda: of_outputs(floats(), onnx, weights(), quantizers(), jittered()))
    default_tolerance = Once(lambda: of_default(tolerance(), onnx, quantizers()))
    engine_tolerance = Once(lambda: allowed or of_engine(onnx, weights(), quantizers(), jittered(), placed))
    expected = (
        None
        if codes is None
        else _once(codes, cast(Any, lambda: StoredCodes(cast(Path, codes))), isinstance(codes, Path))
    )
    files = Artifacts.of(onnx, placed, codes)
    layer_list = None if layers is None else LayerList(layers, onnx)
    task = None if metric is None else _once(metric, cast(Any, metric), not isinstance(metric, MetricTask))

    def jittered() -> list[Arrays]:
        return chain.given_inputs() if quantizers() else []

    def steps(model: nn.Module, inputs: Sequence[Arrays], figures: dict[str, Any]) -> list[str] | None:
        return step_problems(onnx, model, chain.session(), inputs, floats(), figures)

    def end_to_end() -> Tolerance:
        last = engine_tolerance if ENGINE in chain.ran else default_tolerance
        return _together(tolerance(), tolerance(), last())

    def share(done: float) -> None:
        told.progress("verify", len(checks) + done, len(checks_by_name), "metric")

    checks_by_name: dict[str, Callable[[], Check]] = {
        "digest": lambda: check_digests(digests),
        "pattern": lambda: check_pattern(
            lambda: iter_weights(onnx), expected, None if declared is None else Once(declared), files
        ),
        "codes": lambda: check_codes(lambda: iter_weights(onnx), expected, trained, quantizers, layer_list, chain.kept),
        "packed": packed or _nothing_packed,
        "repeatable": lambda: check_repeatable(chain, tolerance, floats, lambda: unknown_operators(onnx)),
        "parity.folded": lambda: check_folded(chain, tolerance),
        "parity.onnx": lambda: check_onnx(chain, tolerance, steps),
        "parity.onnx-default": lambda: check_default(chain, default_tolerance),
        "parity.placed": lambda: check_placed(placed, chain, weights, quantizers),
        "parity.engine": lambda: _engine(engine, chain, engine_tolerance),
        "engine.layers": engine_layers or _nothing_built,
        "agreement": lambda: check_agreement(chain, end_to_end),
        "metric": lambda: check_metric(task, chain.session, trained, share),
    }
    layerwise = Layerwise(chain, placed, floats, out)
    checks: list[Check] = []
    for name, step in checks_by_name.items():
        told.progress("verify", len(checks), len(checks_by_name), name)
        checks.append(layerwise.after(attempt(name, step)))
        told.emit("check", name=name, status=checks[-1].status, detail=checks[-1].detail)
    if out is not None:
        save_chain(chain, out)
        layerwise.write()
    told.progress("verify", len(checks_by_name), len(checks_by_name))
    return Verdict(tuple(checks))


def _engine(engine: EngineUnderTest | None, chain: Chain, tolerance: Once[Tolerance]) -> Check:
    def feeds() -> list[Arrays]:
        chain.require_steady(ONNX)
        return chain.feeds()

    keep = partial(chain.keep, ENGINE)
    return check_engine(engine, chain.onnx, chain.session, tolerance, feeds, chain.golden, keep)


def _nothing_built() -> Check:
    raise NotCheckedError("nothing was built")


def _nothing_packed() -> Check:
    raise NotCheckedError("nothing was packed")


def _together(*hops: Tolerance) -> Tolerance:
    """Return how far hops may move the outputs, one after the other."""
    return Tolerance(sum(one.relative for one in hops), "; then ".join(one.derivation for one in hops))


def _once(given: Any, load: Callable[[], T], must_load: bool) -> Once[T]:
    """Return a value that is there already, or one to be loaded, behind the same call."""
    return Once(load if must_load else lambda: cast(T, given))
