from __future__ import annotations

from importlib import resources

import pytest
import yaml
from onnx import TensorProto
from pydantic import ValidationError

from slope_compile.errors import BackendError
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.target import TARGETS, Target, find_target

RTX = BACKENDS["tensorrt-rtx"]


@pytest.mark.parametrize(
    ("name", "sm"),
    [("a100", (8, 0)), ("h100", (9, 0)), ("l4", (8, 9)), ("rtx-turing", (7, 5)), ("rtx-ampere", (8, 6)),
     ("rtx-ada", (8, 9)), ("rtx-blackwell", (12, 0)), ("gb10", (12, 1)), ("orin", (8, 7)), ("orin-nano", (8, 7)),
     ("thor", (11, 0))],
)  # fmt: skip
def test_compute_capabilities(name: str, sm: tuple[int, int]) -> None:
    assert find_target(name).sm == sm


def test_every_name_is_its_key() -> None:
    assert len(TARGETS) == 11
    assert all(TARGETS[name].name == name for name in TARGETS)


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_fields_agree(target: Target) -> None:
    assert set(target.tflops) == {"fp32", "fp16", "int8"}
    assert target.tflops["fp32"] < target.tflops["fp16"] < target.tflops["int8"]
    assert target.types <= set(TensorProto.DataType.keys())
    assert {"FLOAT", "FLOAT16", "INT8"} <= target.types
    assert ("BFLOAT16" in target.types, target.sparse_speedup) == ((True, 2.0) if target.sm >= (8, 0) else (False, 1.0))
    assert ("FLOAT8E4M3FN" in target.types) == (target.sm >= (8, 9))
    assert (target.rtx != "no") == (target.sm in RTX.ahead_of_time)
    assert target.on_device == target.devices.startswith("Jetson")
    assert target.opt_batch == (1 if target.on_device else 16)
    assert ":" in target.container
    assert target.tensorrt


@pytest.mark.parametrize(
    ("name", "version", "system"),
    [("orin", "10.3.0.26", "JetPack 6"), ("orin", "10.7.0.23", "JetPack 6"), ("orin", "10.8.0", None),
     ("orin", "10.16.2.10", "JetPack 7.2"), ("orin", "11.0.0.114", None), ("orin", "11.4.0.106", None),
     ("orin", "11.4.1.5", "JetPack 7.2.2"), ("orin-nano", "11.4.1.5", None), ("thor", "10.3.0", None),
     ("thor", "10.13.3.9", "JetPack 7.0"), ("thor", "11.4.1", "JetPack 7.2.2"), ("a100", "10.3.0", "server"),
     ("a100", "11.4.0.106", "server"), ("a100", "8.6.1", None), ("rtx-blackwell", "10.7.0", None)],
)  # fmt: skip
def test_which_tensorrt_runs_there(name: str, version: str, system: str | None) -> None:
    assert find_target(name).system_of(version) == system


@pytest.mark.parametrize(("wrong", "near"), [("a10", "a100"), ("rtx-blackwel", "rtx-blackwell"), ("Orin", "orin")])
def test_misspelt(wrong: str, near: str) -> None:
    with pytest.raises(BackendError, match=f"no target '{wrong}'. Did you mean '{near}'"):
        find_target(wrong)


def test_frozen_and_checked() -> None:
    with pytest.raises(ValidationError):
        find_target("a100").sm = (9, 0)  # type: ignore[misc]
    row = yaml.safe_load((resources.files("slope_compile.targets") / "targets.yaml").read_text())["a100"]
    for change in ({"memory": 3}, {"tflops": {"fp64": 1}}, {"rtx": "maybe"}, {"bandwidth_gbs": -1}):
        with pytest.raises(ValidationError):
            Target(name="a100", **{**row, **change})
