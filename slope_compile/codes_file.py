"""codes.safetensors: the coded tensors of a trained model, readable with plain safetensors and numpy.

Layout: `NAME.codes` int8 [shape], `NAME.scale` float32 [channels], and one header entry `coded_tensors`, a JSON object
NAME -> {"bits", "axis", "pattern"}. One entry only: safetensors keeps header entries in no fixed order, and the file's
bytes must depend on its contents alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ArtifactError
from slope_compile.recipe import parse_pattern

HEADER_KEY = "coded_tensors"


def save_codes(path: Path, codes: Mapping[str, CodedTensor]) -> None:
    """Write coded tensors, checked against the laws first.

    Raises:
        ArtifactError: If a tensor breaks its range, pattern or scale law.
    """
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    header: dict[str, dict[str, Any]] = {}
    for name in sorted(codes):
        coded = codes[name]
        coded.check(name)
        tensors[f"{name}.codes"] = np.ascontiguousarray(np.asarray(coded.codes, dtype=np.int8))
        tensors[f"{name}.scale"] = np.ascontiguousarray(np.asarray(coded.scale, dtype=np.float32))
        pattern = None if coded.pattern is None else f"{coded.pattern[0]}:{coded.pattern[1]}"
        header[name] = {"bits": coded.bits, "axis": coded.axis, "pattern": pattern}
    save_file(tensors, path, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})


def load_codes(path: Path) -> dict[str, CodedTensor]:
    """Read coded tensors as numpy arrays, checked against the laws.

    Raises:
        ArtifactError: If the file is missing, truncated, not ours, or a tensor breaks a law.
    """
    remedy = "Make it anew with `slope-compile train`, or take the file from where it was made."
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            return {name: _read(file, name, row) for name, row in header.items()}
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist.", remedy) from None
    except (
        SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise ArtifactError(f"{path} is not a file of coded tensors: {error}.", remedy) from None


def _read(file: Any, name: str, row: Mapping[str, Any]) -> CodedTensor:
    pattern = None if row["pattern"] is None else parse_pattern(row["pattern"])
    codes, scale = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scale")
    if codes.dtype != np.int8 or scale.dtype != np.float32:
        raise ValueError(f"{name} holds {codes.dtype} codes and {scale.dtype} scales, not int8 and float32")
    coded = CodedTensor(codes=codes, scale=scale, bits=int(row["bits"]), axis=int(row["axis"]), pattern=pattern)
    coded.check(name)
    return coded
