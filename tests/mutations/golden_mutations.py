"""Mutations of golden.safetensors: what the trained model gave for some inputs, at export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from checkpoint_mutations import damaged, deleted, edited_tensors, taken_from
from mutation import Corrupt, Mutation

GOLDEN = "export/golden.safetensors"


def _row(kind: str, corrupt: Corrupt, subject: str = "float") -> Mutation:
    return Mutation(kind, "golden.safetensors", corrupt, frozenset({"parity.onnx"}), subject=subject)


def _on(name: str, change: Callable[[Any], Any]) -> Corrupt:
    def edit(tensors: dict[str, Any], texts: dict[str, str]) -> None:
        array = tensors[name].copy()
        edited = change(array)
        tensors[name] = array if edited is None else edited

    return edited_tensors(GOLDEN, edit)


def _edit(change: Callable[[dict[str, Any]], object]) -> Corrupt:
    return edited_tensors(GOLDEN, lambda tensors, _: change(tensors))


def _put(place: Any, value: float) -> Callable[[Any], None]:
    def change(array: Any) -> None:
        array[place] = value

    return change


def _two_rows(array: Any) -> None:
    array[[0, 1]] = array[[1, 0]]


def _exchanged(tensors: dict[str, Any]) -> None:
    tensors["inputs"], tensors["outputs"] = tensors["outputs"], tensors["inputs"]


GOLDEN_FILE = [
    _row("another run's: stale", taken_from("other", GOLDEN)),
    _row("of a model with quantized activations", taken_from("int8", GOLDEN)),
    _row("of a model without quantized activations", taken_from("float", GOLDEN), subject="int8"),
    _row("outputs off by 1e-3", _on("outputs", lambda y: y + np.float32(1e-3))),
    _row(
        "one output of one sample edited",
        _on("outputs", lambda y: y + np.float32(0.01) * (np.arange(16).reshape(4, 4) == 5)),
    ),
    _row("outputs rounded to float16", _on("outputs", lambda y: y.astype("f2").astype("f4"))),
    _row("outputs zero", _on("outputs", lambda y: 0 * y)),
    _row("an output NaN", _on("outputs", _put((1, 2), np.nan))),
    _row("an output infinite", _on("outputs", _put((1, 2), np.inf))),
    _row("outputs of two samples exchanged", _on("outputs", _two_rows)),
    _row("outputs of two classes exchanged", _on("outputs", lambda y: y[:, [1, 0, 2, 3]])),
    _row("one output more", _on("outputs", lambda y: np.concatenate([y, y[:, :1]], 1))),
    _row("an output NaN in one sample's input", _on("inputs", _put((0, 0, 0, 0), np.nan))),
    _row("an input infinite", _on("inputs", _put((0, 0, 0, 0), np.inf))),
    _row("every input NaN", _on("inputs", lambda x: x * np.float32(np.nan))),
    _row("inputs of two samples exchanged", _on("inputs", _two_rows)),
    _row("input channels in reverse", _on("inputs", lambda x: x[:, ::-1])),
    _row("inputs with channels last", _on("inputs", lambda x: x.transpose(0, 2, 3, 1))),
    _row("inputs of another size", _on("inputs", lambda x: x[:, :, :4, :4])),
    _row("inputs normalized otherwise", _on("inputs", lambda x: x * np.float32(0.5))),
    _row("inputs as float64", _on("inputs", lambda x: x.astype("f8"))),
    _row("inputs as integers", _on("inputs", lambda x: x.astype("i8"))),
    _row("one sample fewer among the inputs", _on("inputs", lambda x: x[1:])),
    _row("one sample fewer among the outputs", _on("outputs", lambda y: y[1:])),
    _row("no samples", _edit(lambda t: t.update({name: array[:0] for name, array in t.items()}))),
    _row("outputs missing", _edit(lambda t: t.pop("outputs"))),
    _row("inputs missing", _edit(lambda t: t.pop("inputs"))),
    _row("outputs of another name", _edit(lambda t: t.update(scores=t.pop("outputs")))),
    _row(
        "outputs named as another model's",
        _edit(lambda t: t.update({"outputs.a": t["outputs"], "outputs.b": t.pop("outputs")})),
    ),
    _row("one tensor more", _edit(lambda t: t.update(more=t["inputs"]))),
    _row("inputs and outputs exchanged", _edit(_exchanged)),
    _row("last 5 bytes cut off", damaged(GOLDEN, lambda data: data[:-5])),
    _row("empty", damaged(GOLDEN, lambda data: b"")),
    _row("a header of 2^60 bytes", damaged(GOLDEN, lambda data: (2**60).to_bytes(8, "little") + data[8:])),
    _row("a pickle of its name", damaged(GOLDEN, lambda data: b"\x80\x04N.")),
    _row("deleted", deleted(GOLDEN)),
]
