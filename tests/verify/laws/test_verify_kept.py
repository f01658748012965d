"""A file that lies alone is held against what its golden samples keep of the weights: exact, without a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from verify_twins import Twin, make_codes, make_twin

from slope_compile.compression.codes import CodedTensor
from slope_compile.export.golden import write_golden
from slope_compile.verify.model import verify_model
from slope_compile.verify.verdict import Check


def golden_of(twin: Twin, path: Path) -> Path:
    twin.golden(path)
    tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
    write_golden(path, tensors["inputs"], {"output": tensors["outputs"]}, twin.codes)
    return path


def codes_of(tmp_path: Path, stored: Twin, golden: Path) -> Check:
    return verify_model(stored.write(tmp_path / "m.onnx"), golden=golden)["codes"]


def with_tensor(twin: Twin, name: str, **change: Any) -> Twin:
    changed: CodedTensor = replace(twin.codes[name], **change)
    return replace(twin, codes=twin.codes | {name: changed})


@pytest.mark.parametrize("turned", [False, True])
def test_codes_and_scales_as_they_were_kept(tmp_path: Path, turned: bool) -> None:
    twin = replace(make_twin(), turned_fc=turned)
    check = codes_of(tmp_path, twin, golden_of(twin, tmp_path / "g.safetensors"))
    count = sum(np.asarray(coded.codes).size for coded in twin.codes.values())
    assert (check.status, check.figures["tensors"], check.figures["codes"]) == ("pass", 3, count)
    assert "have the digests that g.safetensors has kept since export" in check.detail


def test_one_code_that_moves_no_answer(tmp_path: Path) -> None:
    twin = make_twin()
    golden = golden_of(twin, tmp_path / "g.safetensors")
    codes = np.array(twin.codes["conv2.weight"].codes)
    place = tuple(np.argwhere(codes == 1)[0])
    codes[place] = 2
    check = codes_of(tmp_path, with_tensor(twin, "conv2.weight", codes=codes), golden)
    assert (check.status, check.figures["failing"]) == ("fail", ["conv2.weight"])


def test_the_last_bit_of_one_scale(tmp_path: Path) -> None:
    twin = make_twin()
    golden = golden_of(twin, tmp_path / "g.safetensors")
    scale = np.array(twin.codes["conv1.weight"].scale)
    scale[0] = np.nextafter(scale[0], np.float32(9))
    check = codes_of(tmp_path, with_tensor(twin, "conv1.weight", scale=scale), golden)
    assert (check.status, check.figures["failing"]) == ("fail", ["conv1.weight"])
    assert "scale: is not the one that g.safetensors was made with" in check.detail


def test_a_weight_that_the_samples_do_not_know(tmp_path: Path) -> None:
    twin = make_twin()
    known = {name: coded for name, coded in twin.codes.items() if name != "fc.weight"}
    check = codes_of(tmp_path, twin, golden_of_codes(twin, known, tmp_path / "g.safetensors"))
    assert check.status == "fail" and "fc.weight: extra" in check.detail
    more = twin.codes | {"gone.weight": twin.codes["fc.weight"]}
    check = codes_of(tmp_path, twin, golden_of_codes(twin, more, tmp_path / "g.safetensors"))
    assert check.status == "fail" and "gone.weight: missing" in check.detail


def golden_of_codes(twin: Twin, codes: dict[str, CodedTensor], path: Path) -> Path:
    golden_of(twin, path)
    tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
    write_golden(path, tensors["inputs"], {"output": tensors["outputs"]}, codes)
    return path


def test_samples_of_another_model_say_nothing_of_this_one(tmp_path: Path) -> None:
    twin = make_twin()
    check = codes_of(tmp_path, twin, golden_of_codes(twin, make_codes(bits=3), tmp_path / "g.safetensors"))
    assert check.status == "not checked" and "g.safetensors is of another model" in check.detail


def rewritten(path: Path, edit: Any) -> Path:
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["made_with"])
    edit(header)
    save_file(load_file(path), path, metadata={"made_with": json.dumps(header)})
    return path


def test_older_samples_keep_less(tmp_path: Path) -> None:
    twin = make_twin()
    golden = rewritten(golden_of(twin, tmp_path / "g.safetensors"), lambda header: header.pop("weights"))
    assert "keeps none of scales" in (check := codes_of(tmp_path, twin, golden)).detail
    assert check.status == "not checked"
    golden = rewritten(golden, lambda header: header.pop("codes"))
    assert "keeps no digests" in (check := codes_of(tmp_path, twin, golden)).detail
    assert check.status == "not checked"


@pytest.mark.parametrize(
    "kept", [9, [], {"axis": 0}, {"axis": 9, "bits": 4, "pattern": None, "scale": "0"}, {"axis": "x"}]
)
def test_a_header_that_lies(tmp_path: Path, kept: Any) -> None:
    twin = make_twin()
    path = golden_of(twin, tmp_path / "g.safetensors")
    golden = rewritten(path, lambda header: header["weights"].update({"fc.weight": kept}))
    verdict = verify_model(twin.write(tmp_path / "m.onnx"), golden=golden)
    assert verdict["codes"].status == ("fail" if isinstance(kept, dict) and "scale" in kept else "not checked")
    assert verdict.verdict == "fail"
