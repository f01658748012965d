"""What a hop does layer by layer: `layers.json` for every hop, and the first layer that differs where one fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope_compile.artifacts import storage_errors
from slope_compile.errors import StorageError
from slope_compile.verify.chain.places import DEFAULT, ENGINE, FOLDED, ONNX, PLACED, TRAINED, Chain
from slope_compile.verify.chain.runners import input_names
from slope_compile.verify.parity.allowed import half_tensors
from slope_compile.verify.parity.tolerance import Tolerance, in_half
from slope_compile.verify.verdict import Check, NotCheckedError, reason, significant

if TYPE_CHECKING:
    from slope_compile.verify.bisect.layers import LayerError
    from slope_compile.verify.bisect.points import Side

NAME = "layers.json"
HOPS = {
    "parity.folded": (TRAINED, FOLDED),
    "parity.onnx": (FOLDED, ONNX),
    "parity.onnx-default": (ONNX, DEFAULT),
    "parity.placed": (ONNX, PLACED),
    "parity.engine": (ONNX, ENGINE),
}
# Whose order and operators the rows take: those of the file, where it was run.
_ORDER = ("parity.onnx", "parity.onnx-default", "parity.placed", "parity.folded")


@dataclass(frozen=True)
class Hop:
    """A parity check, the two places that it compares, and the errors of the layers between them."""

    check: str
    reference: str
    tested: str
    layers: list[LayerError]


class Layerwise:
    """Follows a verification check by check.

    Args:
        chain: The places.
        placed: The file that the engine was built from.
        floats: The tolerance of floats, without what quantized activations add: layers are given equal integers.
        out: Where layers.json and reproducers go; None: nowhere, and layers are looked at on failure only.

    Raises:
        StorageError: If reproducers of an earlier verification cannot be removed.
    """

    def __init__(self, chain: Chain, placed: Path | None, floats: Callable[[], Tolerance], out: Path | None) -> None:
        self._chain, self._placed, self._floats, self._out = chain, placed, floats, out
        self._hops: list[Hop] = []
        if out is not None:
            from slope_compile.verify.bisect.reproducer import clear_reproducers

            clear_reproducers(out, HOPS)

    def after(self, check: Check) -> Check:
        """Return a check with the places that it compared, and if it failed with the first layer that differs."""
        if check.name not in HOPS:
            return check
        reference, tested = HOPS[check.name]
        if check.name == "parity.onnx" and FOLDED not in self._chain.ran:
            reference = TRAINED
        check = replace(check, figures={"from": reference, "to": tested, **check.figures})
        if check.status == "not checked":
            return check
        if tested == ENGINE:
            return self._of_engine(check)
        try:
            sides = self._side(reference), self._side(tested)
        except Exception:  # what cannot be had is why the check failed, or was not made with it
            return check
        if self._out is not None:
            self._hops += self._measured(check, reference, tested, *sides)
        return self._explained(check, *sides) if check.status == "fail" else check

    def write(self) -> None:
        """Write layers.json where there is a place for it.

        Raises:
            StorageError: If the file system refuses.
        """
        if self._out is None:
            return
        rows: dict[str, dict[str, Any]] = {}
        for hop in sorted(self._hops, key=lambda hop: _ORDER.index(hop.check)):
            for layer in hop.layers:
                row = rows.setdefault(layer.name, {"name": layer.name, "operator": layer.operator, "errors": {}})
                row["errors"][hop.check] = {
                    "relative": _number(layer.relative), "allowed": _number(layer.allowed)
                }  # fmt: skip
        for row in rows.values():
            row["errors"] = {check: row["errors"][check] for check in HOPS if check in row["errors"]}
        hops = [{"check": hop.check, "from": hop.reference, "to": hop.tested} for hop in self._hops]
        with storage_errors(self._out):
            text = json.dumps({"hops": hops, "layers": list(rows.values())}, indent=1, allow_nan=False)
            (self._out / NAME).write_text(text + "\n", encoding="utf-8")

    def _side(self, place: str) -> Side:
        from slope_compile.verify.bisect.onnx_side import OnnxSide
        from slope_compile.verify.bisect.torch_side import TorchSide

        if place in (TRAINED, FOLDED):
            model = self._chain.folded_model() if place == FOLDED else self._chain.trained_model()
            return TorchSide(model, input_names(self._chain.session()))
        if place != PLACED:
            return OnnxSide(self._chain.onnx, optimized=place == DEFAULT)
        if self._placed is None or not self._placed.is_file():
            raise NotCheckedError("there is no placed file")
        return OnnxSide(self._placed)

    def _measured(self, check: Check, reference: str, tested: str, before: Side, after: Side) -> list[Hop]:
        from slope_compile.verify.bisect.layers import layer_errors

        try:
            feed = self._chain.given_inputs()[0]
            return [Hop(check.name, reference, tested, layer_errors(before, after, feed, self._allowed(check.name)))]
        except Exception:  # a damaged file, or one with values that cannot be marked: the hop has no rows then
            return []

    def _explained(self, check: Check, before: Side, after: Side) -> Check:
        from slope_compile.verify.bisect.explain import explain

        try:
            feed = self._chain.given_inputs()[0]
            told = check.figures.get("tolerance")
            allowed = Tolerance(told, "") if isinstance(told, float) and told else self._allowed(check.name)
            found = explain(check.name, before, after, feed, allowed, self._out)
        except (OSError, StorageError):
            raise
        except Exception as error:
            return replace(check, figures={**check.figures, "not_located": reason(error)})
        if found is None:
            return check
        return replace(check, detail=f"{check.detail}; {found}", figures={**check.figures, "diverges": found.figures()})

    def _of_engine(self, check: Check) -> Check:
        """Return a failed check with what is not known of its layers, and how it can be had."""
        from slope_compile.verify.bisect.engine import engine_note

        largest, relative = check.figures.get("max_abs"), check.figures.get("relative")
        if check.status != "fail" or self._placed is None or not largest or not relative:
            return check
        note = engine_note(self._placed, check.figures["tolerance"] * largest / relative)
        return replace(check, detail=f"{check.detail}; {note}", figures={**check.figures, "not_located": note})

    def _allowed(self, name: str) -> Tolerance:
        allowed = self._floats()
        if name != "parity.placed" or self._placed is None:
            return allowed
        precision, tensors = half_tensors(self._placed)
        return allowed if precision == "fp32" else in_half(allowed, tensors, precision)


def _number(value: float) -> float | str:
    """Return what JSON can hold of a figure: a shape that differs has an infinite error."""
    rounded = significant(value)
    return rounded if abs(rounded) < float("inf") else str(rounded)
