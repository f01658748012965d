"""A packed model and torch: what is packed of a compressed model, and a plain model that gets it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slope_compile.compression.api import codes as codes_of
from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ModelError
from slope_compile.pack.dtypes import MODEL_TYPES
from slope_compile.pack.kept import KeptTensors
from slope_compile.pack.read import Packed

_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_SHOWN = 3  # names listed in an error


def coded_and_kept(model: nn.Module) -> tuple[Mapping[str, CodedTensor], KeptTensors]:
    """Return what is packed of a compressed model.

    Raises:
        ModelError: If it is not compressed, or its state dict holds what is no plain tensor.
    """
    coded = codes_of(model)
    if not coded:
        raise ModelError(f"{type(model).__name__} is not compressed.", "Call `slope_compile.compress` and train first.")
    state = _plain_state(model)
    dtypes = {name: _TYPES[tensor.dtype] for name, tensor in state.items()}
    arrays = {
        name: CodedTensor(np.asarray(c.codes), np.asarray(c.scale), c.bits, c.axis, c.pattern)
        for name, c in coded.items()
    }
    return arrays, KeptTensors(dtypes, lambda name: _array(state[name], dtypes[name]), coded, "The model")


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict.

    Raises:
        ModelError: If it holds what is no plain tensor with memory.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            what = type(tensor).__name__
        elif tensor.is_meta:
            what = "on the meta device"
        elif tensor.layout is not torch.strided or tensor.dtype not in _TYPES:
            what = f"{tensor.dtype}, {tensor.layout}"
        else:
            continue
        remedy = "Convert it first; a model on the meta device must be built on a real one."
        raise ModelError(f"'{name}' of the model's state dict is {what}: no plain tensor.", remedy)
    return dict(state)


def load_into(packed: Packed, model: nn.Module) -> None:
    """Give a plain model the packed weights and everything else of the state dict.

    Args:
        packed: A packed model.
        model: Of the same architecture, not compressed; one with quantized activations compressed alike and folded.

    Raises:
        ModelError: If names, shapes or types differ, or its state dict holds what is no plain tensor; the model is
            left as it was.
        ArtifactError: If the packed file is damaged; so is then.
    """
    if packed.kind != "model":
        raise ModelError(f"{packed.path} holds an ONNX file, no weights of a torch model.", "Restore it instead.")
    state = _plain_state(model)
    given = {name: ("F32", packed.codes.shape(name)) for name in packed.codes}
    given |= {name: (packed.tensors.dtype(name), packed.tensors.shape(name)) for name in packed.tensors}
    if differences := _differences(state, given):
        raise ModelError(
            f"{packed.path} does not fit {type(model).__name__}: {'; '.join(differences)}.",
            "Give the model as it was before it was compressed; with quantized activations compress it and `fold` it.",
        )
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    if made := sorted(given.keys() - {name for name, _ in named}):  # a copy: what is written into it is lost
        problem = f"'{made[0]}' of the model's state dict is neither a parameter nor a buffer of it."
        raise ModelError(problem, "Keep it as a buffer.")
    packed.check()
    _require_equal_where_tied(packed, {name: state[name] for name in given})
    with torch.no_grad():
        for name in given:
            state[name].copy_(_value(packed, name, state[name].dtype))


def _require_equal_where_tied(packed: Packed, state: Mapping[str, Tensor]) -> None:
    """Raise if one tensor of the model would be given two values."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        other = first.setdefault(_place(tensor), name)
        if other != name:
            one, two = (_value(packed, each, tensor.dtype).reshape(-1).view(torch.uint8) for each in (other, name))
            if not torch.equal(one, two):
                raise ModelError(
                    f"'{other}' and '{name}' are one tensor in the model, and two in {packed.path}.",
                    "Untie them in the model that is loaded.",
                )


def _value(packed: Packed, name: str, dtype: torch.dtype) -> Tensor:
    if name in packed.codes:
        return torch.from_numpy(packed.codes[name].dequantize())
    array = packed.tensors[name]
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(dtype).reshape(array.shape)


def _differences(state: Mapping[str, Tensor], given: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    # A tensor of two names may be packed under one of them.
    places = {_place(state[name]) for name in given.keys() & state.keys()}
    missing = [name for name in sorted(state.keys() - given.keys()) if _place(state[name]) not in places]
    unlike = [
        f"{name} is {dtype} {list(shape)} in the file, {kind} {list(tensor.shape)} in the model"
        for name, (dtype, shape) in sorted(given.items())
        for tensor in [state.get(name)]
        if tensor is not None
        for kind in [_TYPES[tensor.dtype]]
        if (dtype, shape) != (kind, tuple(tensor.shape))
    ]
    listed = {"not in the file": missing, "not in the model": sorted(given.keys() - state.keys())}
    return [f"{_some(names)} {where}" for where, names in listed.items() if names] + unlike[:_SHOWN]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two names of one tensor have in common."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _array(tensor: Tensor, dtype: str) -> npt.NDArray[Any]:
    host = tensor.detach().cpu().contiguous()
    shape = tuple(host.shape)
    return host.reshape(-1).view(torch.uint8).numpy().view(MODEL_TYPES[dtype]).reshape(shape)
