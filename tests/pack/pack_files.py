"""Small models and ONNX files to pack, and packed files that lie."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file
from torch import nn

import slope_compile as sc
from slope_compile.codes_file import save_codes
from slope_compile.compression.codes import CodedTensor

MAGIC = b"\x89SLOPE\r\n"


def net() -> nn.Module:
    """A first, a 2:4 and a last layer, and a norm between them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def compressed(bits: int = 4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = net()
    sc.compress(model, bits=bits, **options)
    model(torch.randn(4, 3, 12, 12))  # sets the steps of activations
    return model


def save_train(model: nn.Module, folder: Path) -> Path:
    """What `train` leaves: checkpoint and codes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "checkpoint.safetensors")
    save_codes(folder / "codes.safetensors", sc.codes(model))
    return folder


def random_codes(shape: tuple[int, ...], bits: int = 4, pattern: tuple[int, int] | None = None, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
    if pattern is not None:
        n, m = pattern
        for place in range(n, m):
            codes[:, place::m] = 0
    return CodedTensor(codes, rng.uniform(0.01, 1, shape[0]).astype(np.float32), bits, 0, pattern)


def sparse(shape: tuple[int, ...], n: int, m: int, axis: int, seed: int = 0, bits: int = 4) -> Any:
    """Codes with at most n of every m along an axis not zero."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
    last = np.moveaxis(codes, axis, -1)
    groups = last.reshape(*last.shape[:-1], -1, m)
    order = rng.random(groups.shape).argsort(-1)
    groups = np.where(order < n, groups, 0).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(last.shape), -1, axis))


def header_of(data: bytes) -> Any:
    _, length, raw = struct.unpack("<3L", data[8:20])
    stored = data[52 : 52 + length]
    return json.loads(stored if length == raw else zstandard.ZstdDecompressor().decompress(stored))


def sections_of(data: bytes) -> bytes:
    return data[52 + struct.unpack("<L", data[12:16])[0] :]


def with_header(data: bytes, header: Any, sections: bytes | None = None) -> bytes:
    """A file whose header says something else, its digest in order; text is taken as it is."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    )
    begin = MAGIC + struct.pack("<3L", 1, len(text), len(text))
    return begin + hashlib.sha256(begin + text).digest() + text + (sections_of(data) if sections is None else sections)


def edited(data: bytes, edit: Callable[[Any], object]) -> bytes:
    """A file whose header was edited in place."""
    header = header_of(data)
    edit(header)
    return with_header(data, header)
