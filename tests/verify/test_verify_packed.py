"""`packed`: every tensor against the checkpoint's, by name, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from qdq_graphs import sparse_codes
from safetensors.numpy import save_file

from slope_compile.codes_file import save_codes
from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ArtifactError, LaterFormatError
from slope_compile.pack.dtypes import MODEL_TYPES
from slope_compile.pack.kept import KeptTensors, kept_of_checkpoint
from slope_compile.pack.write import _packed_model, pack_onnx, pack_run
from slope_compile.verify.laws.packed import check_packed, check_packed_model
from slope_compile.verify.model import verify_model
from slope_compile.verify.packed import verify_packed

LATENTS = ("a.parametrizations.weight", "z.parametrizations.weight")


def coded(seed: int = 0, **changed: Any) -> CodedTensor:
    codes = sparse_codes(np.random.default_rng(seed), (6, 8), 4, 1)
    tensor = CodedTensor(codes=codes, scale=np.full(6, 0.5, np.float32), bits=4, axis=0, pattern=(2, 4))
    return replace(tensor, **changed)


def edited(tensor: CodedTensor, **changed: Any) -> CodedTensor:
    """A tensor with the first element of an array replaced."""
    arrays = {name: getattr(tensor, name).copy() for name in changed}
    for name, value in changed.items():
        arrays[name].reshape(-1)[np.flatnonzero(arrays[name])[0]] = value
    return replace(tensor, **arrays)


def others(**changed: Any) -> dict[str, np.ndarray]:
    zero = np.zeros(4, np.float32)
    half = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    tensors = {"b.bias": zero, "b.step": np.ones((), np.float32), "b.half": half, "b.flags": np.array([True, False])}
    made = {**tensors, **latents("a.weight", "z.weight"), **changed}
    return {name: array for name, array in made.items() if array is not None}


def latents(*weights: str) -> dict[str, np.ndarray]:
    layers = [f"{weight.removesuffix('.weight')}.parametrizations.weight" for weight in weights]
    made = {f"{layer}.original": np.ones((6, 8), np.float32) for layer in layers}
    return made | {f"{layer}.0.step": np.ones((), np.float32) for layer in layers}


def write(train: Path, codes: dict[str, CodedTensor], tensors: dict[str, np.ndarray]) -> Path:
    train.mkdir(exist_ok=True)
    save_codes(train / "codes.safetensors", codes)
    save_file(tensors, train / "checkpoint.safetensors")
    return train


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A packed file of two coded tensors, whose train folder may change afterwards."""
    write(tmp_path / "train", {"a.weight": coded(), "z.weight": coded(1, pattern=None, bits=8)}, others())
    return pack_run(tmp_path / "train", tmp_path / "model.slope").path


def test_what_was_trained_passes(packed: Path, tmp_path: Path) -> None:
    check = check_packed(packed, tmp_path / "train")
    assert (check.status, check.figures["codes"], check.figures["failing"]) == ("pass", 96, [])
    assert check.figures["bytes"] == packed.stat().st_size
    assert check.detail.startswith("96 codes of 2 tensors and their scales, and 4 other tensors are the checkpoint's")


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ({"a.weight": edited(coded(), codes=0)}, "a.weight: codes: 1 of 48 differ"),
        ({"a.weight": edited(coded(), scale=0.25)}, "scale: 1 of 6 differ from the trained ones, the first at [0]"),
        ({"a.weight": coded(bits=5)}, "a.weight: bits: 4 in the packed file, 5 as trained"),
        ({"a.weight": coded(pattern=(3, 4))}, "a.weight: pattern: (2, 4) in the packed file, (3, 4) as trained"),
        (
            {"a.weight": coded(axis=1, scale=np.full(8, 0.5, np.float32))},
            "a.weight: axis: 0 in the packed file, 1 as trained; a.weight: scale: float32 [6] in the packed file",
        ),
        ({"b.weight": coded()}, "b.weight: missing: coded in the checkpoint, and not coded in the packed file"),
        ({"z.weight": None}, "z.weight: extra: coded in the packed file, and not coded in the checkpoint"),
    ],
)  # fmt: skip
def test_other_codes_are_named(packed: Path, tmp_path: Path, codes: dict[str, Any], words: str) -> None:
    kept = {"a.weight": coded(), "z.weight": coded(1, pattern=None, bits=8)} | codes
    trained = {name: tensor for name, tensor in kept.items() if tensor is not None}
    write(tmp_path / "train", trained, others(**latents(*codes)))
    check = check_packed(packed, tmp_path / "train")
    assert (check.status, check.figures["failing"]) == ("fail", list(codes))
    assert words in check.detail


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"b.bias": np.array([0, 0, -0.0, 0], np.float32)}, "1 of 4 differ from the trained ones, the first at [2]"),
        ({"b.step": np.full((), np.nan, np.float32)}, "b.step: values: 1 of 1 differ"),
        ({"b.bias": np.zeros((2, 2), np.float32)}, "float32 [4] in the packed file, float32 [2, 2] as trained"),
        ({"b.bias": np.zeros(4, np.int32)}, "b.bias: values: float32 [4] in the packed file, int32 [4] as trained"),
        ({"b.half": np.array([1.5, -2.015625], ml_dtypes.bfloat16)}, "b.half: values: 1 of 2 differ"),
        ({"b.flags": np.array([True, True])}, "b.flags: values: 1 of 2 differ"),
        ({"b.flags": None}, "b.flags: extra: in the packed file, and not in the checkpoint"),
        ({"c.bias": np.zeros(1, np.float32)}, "c.bias: missing: in the checkpoint, and not in the packed file"),
        ({"c.parametrizations.weight.original": np.zeros(1, np.float32)}, "weight.original: missing"),
    ],
)  # fmt: skip
def test_other_floats_are_named(packed: Path, tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    codes = {"a.weight": coded(), "z.weight": coded(1, pattern=None, bits=8)}
    write(tmp_path / "train", codes, others(**tensors))
    check = check_packed(packed, tmp_path / "train")
    assert (check.status, check.figures["failing"]) == ("fail", list(tensors))
    assert words in check.detail


def test_a_layer_of_two_names_is_packed_under_one(tmp_path: Path) -> None:
    train = write(tmp_path / "train", {"a.weight": coded()}, others())  # the latents of z are those of a
    packed = pack_run(train, tmp_path / "m.slope")
    assert check_packed(packed.path, train).status == "pass"
    write(train, {"a.weight": coded()}, others(**{f"{LATENTS[1]}.original": np.zeros((6, 8), np.float32)}))
    check = check_packed(packed.path, train)
    assert check.figures["failing"] == ["checkpoint.safetensors"]
    assert f"has '{LATENTS[1]}.original', and no coded tensor was made of it" in check.detail


def test_a_checkpoint_without_what_codes_were_made_of_fails(packed: Path, tmp_path: Path) -> None:
    codes = {"a.weight": coded(5), "z.weight": coded(1, pattern=None, bits=8)}
    write(tmp_path / "train", codes, others(**{f"{LATENTS[1]}.0.step": None}))
    check = check_packed(packed, tmp_path / "train")
    assert check.figures["failing"] == ["a.weight", "checkpoint.safetensors"]
    assert f"has no '{LATENTS[1]}.0.step'" in check.detail


@pytest.mark.parametrize("dtype", sorted(MODEL_TYPES))
def test_every_type_is_compared_by_its_bytes(dtype: str, tmp_path: Path) -> None:
    plain = np.array([[0, 1], [1, 0]])
    values = plain.astype(MODEL_TYPES[dtype])
    train = tmp_path / "train"
    train.mkdir()
    save_codes(train / "codes.safetensors", {"a.weight": coded()})

    def kept(array: np.ndarray, name: str = dtype) -> KeptTensors:
        made = {"x": (name, array)} | {name: ("F32", one) for name, one in latents("a.weight").items()}
        _save(train / "checkpoint.safetensors", made)
        return kept_of_checkpoint(train / "checkpoint.safetensors", ["a.weight"])

    packed = _packed_model({"a.weight": coded()}, kept(values), tmp_path / "m.slope").path
    assert check_packed(packed, train).status == "pass"
    other = values.copy()
    other.view(np.uint8).reshape(-1)[-1] ^= 1
    kept(other)
    words = "x: values: 1 of 4 differ from the trained ones, the first at [1, 1]"
    assert check_packed(packed, train).detail == words
    as_other = "BF16" if dtype == "F32" else "F32"
    kept(plain.astype(MODEL_TYPES[as_other]), as_other)
    types = f"{MODEL_TYPES[dtype]} [2, 2] in the packed file, {MODEL_TYPES[as_other]} [2, 2] as trained"
    assert check_packed(packed, train).detail == f"x: values: {types}"


def _save(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file of types that numpy lacks too."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (at, at + array.nbytes)}
        at += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for _, a in tensors.values()))


def test_a_later_format_is_not_judged(packed: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[8] = 2
    packed.write_bytes(data)
    with pytest.raises(LaterFormatError, match="Update slope-compile"):
        verify_packed(packed)
    assert not list(packed.parent.glob("*.verify*"))


def test_one_damaged_tensor_does_not_hide_another(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(container: object, entry: Any) -> Any:
            if entry.name in ("a.weight", "b.bias"):
                raise ArtifactError(f"{entry.name} is damaged.", "Pack again.")
            return real(container, entry)

        return read

    from slope_compile.pack import read as module

    for name in ("read_coded", "read_tensor"):
        monkeypatch.setattr(module, name, damaged(getattr(module, name)))
    for check in (check_packed(packed, tmp_path / "train"), check_packed_model(module.open_packed(packed))):
        assert (check.status, check.figures["failing"]) == ("fail", ["a.weight", "b.bias"])
        assert "b.bias: packed: b.bias is damaged." in check.detail


def test_floats_of_a_lone_file_obey_the_laws_too(tmp_path: Path) -> None:
    codes = {"a.weight": coded(), "z.weight": coded()}
    train = write(tmp_path / "train", codes, others(**{"b.running_var": np.full(2, -1.0, np.float32)}))
    packed = pack_run(train, tmp_path / "m.slope")
    check = check_packed_model(packed)
    assert (check.status, check.figures["failing"]) == ("fail", ["b.running_var"])


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "C64"])
def test_nan_of_any_type_is_found(dtype: str, tmp_path: Path) -> None:
    values = np.array([1.0, np.nan, 0.5]).astype(MODEL_TYPES[dtype])
    state = {"x": dtype} | dict.fromkeys(latents("a.weight"), "F32")
    kept = KeptTensors(state, {"x": values}.__getitem__, ["a.weight"], "it")
    check = check_packed_model(_packed_model({"a.weight": coded()}, kept, tmp_path / "m.slope"))
    assert (check.status, check.figures["failing"]) == ("fail", ["x"])


@pytest.mark.parametrize("types", [{}, {"x": "F32"}])
def test_a_lone_file_without_coded_tensors_proves_nothing(types: dict[str, str], tmp_path: Path) -> None:
    kept = KeptTensors(types, {"x": np.ones(2, np.float32)}.__getitem__, [], "it")
    check = check_packed_model(_packed_model({}, kept, tmp_path / "m.slope"))
    assert (check.status, check.detail) == (
        "fail",
        "m.slope: codes: no coded tensor is in it, so there is no law to prove",
    )


def test_a_packed_onnx_file_is_not_what_a_run_trained(packed: Path, tmp_path: Path, net: Callable[..., Path]) -> None:
    other = pack_onnx(net(), tmp_path / "other.slope").path
    with pytest.raises(ArtifactError, match="holds an ONNX file"):
        check_packed(other, tmp_path / "train")


def test_a_lone_packed_onnx_file_passes_only_where_the_onnx_file_does(tmp_path: Path, net: Callable[..., Path]) -> None:
    path = net()
    verdict = verify_packed(pack_onnx(path, tmp_path / "other.slope").path)
    assert (verdict["packed"].status, verdict.verdict) == ("pass", verify_model(path).verdict) == ("pass", "fail")
    saved = json.loads((tmp_path / "other.verify" / "verify.json").read_text())
    assert saved["verdict"] == "fail"


def test_a_lone_packed_model_passes_by_its_laws(packed: Path) -> None:
    assert verify_packed(packed).verdict == "pass"
