"""Mutations of what training left: codes.safetensors, checkpoint.safetensors, metrics.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mutation import Corrupt, Mutation, Subject
from safetensors import safe_open
from safetensors.numpy import save_file
from weight_kinds import CORE, Coded, WeightKind

CODES, CHECKPOINT, METRICS = "train/codes.safetensors", "train/checkpoint.safetensors", "train/metrics.json"
RECORD = "train/validation.safetensors"
HEADER = "coded_tensors"
BOTH = ("pattern", "codes")
Tensors = dict[str, Any]
CONV = "conv.parametrizations.weight"


def _row(kind: str, file: str, corrupt: Corrupt, *by: str, missed: str = "") -> Mutation:
    return Mutation(kind, Path(file).name, corrupt, frozenset(by), missed=missed)


def _with_packed(rows: list[Mutation]) -> list[Mutation]:
    return [replace(row, by=row.by | {"packed"}) for row in rows]


def edited_tensors(file: str, edit: Callable[[Tensors, dict[str, str]], None]) -> Corrupt:
    """Return what edits a safetensors file: its tensors and its header's texts."""

    def corrupt(subject: Subject) -> None:
        path = subject.file(file)
        with safe_open(path, framework="numpy") as opened:
            tensors, texts = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        edit(tensors, texts)
        save_file({name: np.array(array, order="C") for name, array in tensors.items()}, path, metadata=texts)

    return corrupt


def damaged(file: str, change: Callable[[bytes], bytes]) -> Corrupt:
    """Return what changes a file's bytes."""

    def corrupt(subject: Subject) -> None:
        path = subject.file(file)
        path.write_bytes(change(path.read_bytes()))

    return corrupt


def deleted(file: str) -> Corrupt:
    return lambda subject: subject.file(file).unlink()


def taken_from(run: str, file: str) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        shutil.copy(subject.runs[run] / file, subject.file(file))

    return corrupt


def _codes(kind: str, edit: Callable[[Tensors, dict[str, Any]], None], *by: str, missed: str = "") -> Mutation:
    """A mutation of codes.safetensors; `edit` gets its tensors and its rows of bits, axis and pattern."""

    def edited(tensors: Tensors, texts: dict[str, str]) -> None:
        rows = json.loads(texts[HEADER])
        edit(tensors, rows)
        texts[HEADER] = json.dumps(rows)

    return _row(kind, CODES, edited_tensors(CODES, edited), *(by or ("codes",)), missed=missed)


def _weight(one: WeightKind) -> Mutation:
    def edit(tensors: Tensors, rows: dict[str, Any]) -> None:
        coded = one.change(Coded(tensors[f"{one.layer}.codes"], tensors[f"{one.layer}.scale"]))
        tensors |= {f"{one.layer}.codes": coded.codes, f"{one.layer}.scale": coded.scale}

    return _codes(one.kind, edit, *(BOTH if one.lawless else ("codes",)))


def _declare(**given: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, rows: rows["conv.weight"].update(given)


def _without(tensors: Tensors, rows: dict[str, Any]) -> None:
    for name in ("codes", "scale"):
        del tensors[f"conv.weight.{name}"]
    del rows["conv.weight"]


def _without_codes(tensors: Tensors, rows: dict[str, Any]) -> None:
    del tensors["conv.weight.codes"]


def _extra(tensors: Tensors, rows: dict[str, Any]) -> None:
    for name in ("codes", "scale"):
        tensors[f"more.weight.{name}"] = tensors[f"conv.weight.{name}"]
    rows["more.weight"] = rows["conv.weight"]


def _exchanged(tensors: Tensors, rows: dict[str, Any]) -> None:
    for name in ("codes", "scale"):
        one, other = f"conv.weight.{name}", f"again.weight.{name}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


def _as_type(name: str, dtype: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def edit(tensors: Tensors, rows: dict[str, Any]) -> None:
        tensors[name] = tensors[name].astype(dtype)

    return edit


def _header(text: str | None) -> Corrupt:
    def edit(tensors: Tensors, texts: dict[str, str]) -> None:
        texts.clear()
        if text is not None:
            texts[HEADER] = text

    return edited_tensors(CODES, edit)


def _out_of_range(tensors: Tensors, rows: dict[str, Any]) -> None:
    codes = tensors["conv.weight.codes"]
    codes[tuple(np.argwhere(codes)[0])] = 8


def _long_header(data: bytes) -> bytes:
    """A header of 2^60 bytes, as its first 8 bytes say."""
    return (2**60).to_bytes(8, "little") + data[8:]


# Each of these differs from what was packed, too.
CODES_FILE = _with_packed(
    [_weight(one) for one in CORE]
    + [
        _codes("a code out of its bits' range", _out_of_range, *BOTH),
        _codes("a pattern that does not hold declared", _declare(pattern="1:4"), *BOTH),
        _codes("no pattern declared", _declare(pattern=None)),
        _codes("a weaker pattern declared", _declare(pattern="3:4")),
        _codes("more bits declared", _declare(bits=8)),
        _codes("fewer bits declared", _declare(bits=3), *BOTH),
        _codes("another axis declared", _declare(axis=1)),
        _codes("a pattern that is none", _declare(pattern="2:0")),
        _codes("a layer missing", _without),
        _codes("a layer's codes missing", _without_codes),
        _codes("a layer more", _extra),
        _codes("two layers exchanged", _exchanged),
        _codes("codes as int32", _as_type("conv.weight.codes", np.int32), *BOTH),
        _codes("scales as float64", _as_type("conv.weight.scale", np.float64), *BOTH),
        _row("header left out", CODES, _header(None), "codes"),
        _row("header that is no JSON", CODES, _header("{"), "codes"),
        _row("header that lists nothing", CODES, _header("{}"), "codes"),
        _row("last 5 bytes cut off", CODES, damaged(CODES, lambda data: data[:-5]), "codes"),
        _row("empty", CODES, damaged(CODES, lambda data: b""), "codes"),
        _row("a header of 2^60 bytes", CODES, damaged(CODES, _long_header), "codes"),
        _row("deleted", CODES, deleted(CODES), "codes"),
        _row("another run's", CODES, taken_from("other", CODES), "codes"),
        _row("the checkpoint in its place", CODES, lambda s: shutil.copy(s.file(CHECKPOINT), s.file(CODES)), "codes"),
    ]
)


def _tensors(kind: str, edit: Callable[[Tensors], None], *by: str) -> Mutation:
    return _row(kind, CHECKPOINT, edited_tensors(CHECKPOINT, lambda tensors, _: edit(tensors)), *by)


def _on(name: str, change: Callable[[Any], Any]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        array = tensors[name].copy()
        edited = change(array)
        tensors[name] = array if edited is None else np.asarray(edited, array.dtype)

    return edit


def _swap(one: str, other: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return edit


def _largest_negated(latent: Any) -> None:
    place = np.unravel_index(np.abs(latent).argmax(), latent.shape)
    latent[place] = -latent[place]


def _rows_swapped(latent: Any) -> None:
    latent[[0, 1]] = latent[[1, 0]]


def _inputs_swapped(latent: Any) -> None:
    latent[:, [0, 1]] = latent[:, [1, 0]]


def _put(place: Any, value: float) -> Callable[[Any], None]:
    def change(array: Any) -> None:
        array[place] = value

    return change


LATENT, STEP = f"{CONV}.original", f"{CONV}.0.step"
LATENTS = [  # not packed
    _tensors("one latent weight negated", _on(LATENT, _largest_negated), "codes"),
    _tensors("latents of two output channels exchanged", _on(LATENT, _rows_swapped), "codes"),
    _tensors("latents of two input channels exchanged", _on(LATENT, _inputs_swapped), "codes"),
    _tensors("latents transposed", _on(LATENT, lambda w: w.swapaxes(0, 1)), "codes"),
    _tensors(
        "a square matrix's latents transposed", _on("mix.parametrizations.weight.original", np.transpose), "codes"
    ),
    _tensors("latents zero", _on(LATENT, lambda w: 0 * w), "codes"),
    _tensors("a latent NaN", _on(LATENT, _put((0, 0, 0, 0), np.nan)), *BOTH),
    _tensors("a latent infinite", _on(LATENT, _put((0, 0, 0, 0), np.inf)), *BOTH),
    _tensors("one step doubled", _on(STEP, lambda s: s * np.float32([2] + [1] * 15)), "codes"),
    _tensors("steps of two channels exchanged", _on(STEP, _rows_swapped), "codes"),
    _tensors("a step NaN", _on(STEP, _put(0, np.nan)), *BOTH),
    _tensors("a step off by its last bit", _on(STEP, lambda s: np.nextafter(s, np.float32(9))), "codes"),
    _tensors("latents of two layers exchanged", _swap(LATENT, LATENT.replace("conv", "again")), "codes"),
]
CHECKPOINT_FILE = LATENTS + _with_packed(
    [
        _tensors("a bias edited", _on("again.bias", lambda b: b + np.float32(0.01)), "parity.onnx"),
        _tensors("a bias NaN", _on("head.bias", _put(0, np.nan)), "pattern", "parity.onnx"),
        _tensors("running mean edited", _on("norm.running_mean", lambda m: m + np.float32(0.01)), "parity.onnx"),
        _tensors("running variance doubled", _on("norm.running_var", lambda v: v * 2), "parity.onnx"),
        _tensors("a batch norm's count of batches", _on("norm.num_batches_tracked", lambda count: count + 1), "packed"),
        _tensors("batch norms exchanged", _swap("norm.weight", "stem.1.weight"), "parity.onnx"),
        _tensors("a tensor missing", lambda tensors: tensors.pop("again.bias"), "codes", "parity.onnx"),
        _tensors("a tensor more", lambda t: t.update({"more.bias": t["head.bias"]}), "codes", "parity.onnx"),
        _tensors(
            "a tensor of another name", lambda t: t.update({"again.b": t.pop("again.bias")}), "codes", "parity.onnx"
        ),
        _tensors(
            "a tensor of another shape", lambda t: t.update({"head.bias": np.zeros(5, "f4")}), "codes", "parity.onnx"
        ),
        _tensors(
            "a tensor as float16",
            lambda t: t.update({"head.bias": t["head.bias"].astype("f2")}),
            "codes",
            "parity.onnx",
        ),
        _row("last 5 bytes cut off", CHECKPOINT, damaged(CHECKPOINT, lambda d: d[:-5]), *BOTH, "parity.onnx"),
        _row("empty", CHECKPOINT, damaged(CHECKPOINT, lambda d: b""), *BOTH, "parity.onnx"),
        _row("a header of 2^60 bytes", CHECKPOINT, damaged(CHECKPOINT, _long_header), *BOTH, "parity.onnx"),
        _row("a pickle of its name", CHECKPOINT, damaged(CHECKPOINT, lambda d: b"\x80\x04N."), *BOTH, "parity.onnx"),
        _row("deleted", CHECKPOINT, deleted(CHECKPOINT), "codes", "parity.onnx"),
        _row("another run's", CHECKPOINT, taken_from("other", CHECKPOINT), "codes", "parity.onnx"),
        _row("the codes in its place", CHECKPOINT, lambda s: shutil.copy(s.file(CODES), s.file(CHECKPOINT)), "codes"),
    ]
)


def _figures(kind: str, edit: Callable[[dict[str, Any]], object], *by: str, missed: str = "") -> Mutation:
    def corrupt(subject: Subject) -> None:
        path = subject.file(METRICS)
        told = json.loads(path.read_text())
        edit(told)
        path.write_text(json.dumps(told))

    return _row(kind, METRICS, corrupt, *(by or ("metric",)), missed=missed)


def _accuracy(which: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda told: told[which].update(accuracy=value)


METRICS_FILE = [
    _figures("FP32 accuracy higher", _accuracy("fp32", 1.5)),
    _figures("FP32 accuracy lower: a drop hidden", _accuracy("fp32", 0.5)),
    _figures("the trained model's accuracy lower: a drop hidden", _accuracy("compressed", 0.5)),
    _figures("FP32 accuracy NaN", _accuracy("fp32", float("nan"))),
    _figures("FP32 accuracy negative", _accuracy("fp32", -1.0)),
    _figures("FP32 accuracy a text", _accuracy("fp32", "good")),
    _figures("FP32 accuracy a list", _accuracy("fp32", [1.0])),
    _figures("no FP32 accuracy", lambda told: told["fp32"].pop("accuracy")),
    _figures("no FP32 figures", lambda told: told.pop("fp32")),
    _figures("the trained model's figures a number", lambda told: told.update(compressed=1)),
    _figures("no metric named", lambda told: told.pop("metric")),
    _figures("another metric named", lambda told: told.update(metric="mask_map")),
    _figures("a metric that is none", lambda told: told.update(metric=["accuracy"])),
    _row("last 5 bytes cut off", METRICS, damaged(METRICS, lambda data: data[:-5]), "metric"),
    _row("a list", METRICS, damaged(METRICS, lambda data: b"[]"), "metric"),
    _row("nested 100000 deep", METRICS, damaged(METRICS, lambda data: b"[" * 100000), "metric"),
    _row("bytes that are no text", METRICS, damaged(METRICS, lambda data: b"\xff\xfe\x00"), "metric"),
    _row("empty", METRICS, damaged(METRICS, lambda data: b""), "metric"),
    _row("deleted", METRICS, deleted(METRICS), "metric"),
    _row("another run's", METRICS, taken_from("other", METRICS), "metric"),
]


def _record(kind: str, edit: Callable[[Tensors], None], *by: str) -> Mutation:
    return _row(kind, RECORD, edited_tensors(RECORD, lambda tensors, _: edit(tensors)), *(by or ("metric",)))


NO_RECORD = "earlier versions kept none: where the manifest lists none either, that no interval is told is said"
RECORD_FILE = [
    _record("FP32 answers wrong: a drop hidden", _on("fp32.predictions", lambda classes: (classes + 1) % 4)),
    _record("the trained model's answers wrong", _on("compressed.predictions", lambda classes: (classes + 1) % 4)),
    _record(
        "one answer edited", _on("compressed.predictions", lambda classes: classes ^ (np.arange(len(classes)) == 3))
    ),
    _row("another run's", RECORD, taken_from("other", RECORD), "metric"),
    _row("empty", RECORD, damaged(RECORD, lambda data: b""), "metric"),
    _row("deleted", RECORD, deleted(RECORD), missed=NO_RECORD),
    _row("last 5 bytes cut off", RECORD, damaged(RECORD, lambda data: data[:-5]), "metric"),
]
