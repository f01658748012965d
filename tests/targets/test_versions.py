"""The table of differences against what the bindings wheels of each version really hold: see bindings.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from strict_trt import DATA, fixture

from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.versions import DIFFERENCES, has, parse_version

FIXTURES = sorted(path.stem.removeprefix("bindings-") for path in DATA.glob("bindings-*.json"))
# feature -> where the bindings show it; the rest are facts of the documentation, each with its source in the table
SHOWN: dict[str, Callable[[dict[str, list[str]]], bool]] = {
    "asks_for_strong_typing": lambda enums: "EXPLICIT_BATCH" in enums["NetworkDefinitionCreationFlag"],
    "precision_flags": lambda enums: {"FP16", "INT8", "INT4"} <= set(enums["BuilderFlag"]),
    "same_compute_capability": lambda enums: "SAME_COMPUTE_CAPABILITY" in enums["HardwareCompatibilityLevel"],
    "editable_timing_cache": lambda enums: "EDITABLE_TIMING_CACHE" in enums["BuilderFlag"],
    "fp4": lambda enums: "FP4" in enums["DataType"],
}
DOCUMENTED = {"dla", "refit_drops_bias"}
USED_FLAGS = {"SPARSE_WEIGHTS", "TF32", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN", "VERSION_COMPATIBLE", "GPU_FALLBACK"}
USED = {
    "IBuilderConfig": {"create_timing_cache", "set_timing_cache", "get_timing_cache", "set_memory_pool_limit",
                       "builder_optimization_level", "hardware_compatibility_level", "default_device_type", "DLA_core",
                       "profiling_verbosity", "set_flag", "add_optimization_profile"},
    "Builder": {"create_network", "create_builder_config", "build_serialized_network"},
    "OnnxParser": {"parse_from_file", "num_errors", "get_error"},
    "ParserError": {"desc", "node_name", "node_operator"},
    "Runtime": {"deserialize_cuda_engine", "engine_host_code_allowed"},
    "ICudaEngine": {"create_engine_inspector"},
    "EngineInspector": {"get_engine_information"},
    "ITimingCache": {"serialize"},
}  # fmt: skip


def backend_of(name: str) -> str:
    return "tensorrt-rtx" if name.startswith("rtx") else "tensorrt"


def test_the_wheels_that_are_held() -> None:
    assert {"tensorrt-10.3.0", "tensorrt-10.7.0", "tensorrt-11.0.0.114", "tensorrt-11.4.0.106"} <= set(FIXTURES)
    assert any(name.startswith("rtx-1.") for name in FIXTURES)
    for name in FIXTURES:
        found = fixture(name)
        assert found["wheel"].startswith("tensorrt_")
        assert found["version"] in found["wheel"]
        assert len(found["sha256"]) == 64


def test_every_row_is_shown_or_documented() -> None:
    assert set(DIFFERENCES) == set(SHOWN) | DOCUMENTED


@pytest.mark.parametrize("feature", SHOWN)
def test_the_table_says_what_the_bindings_hold(feature: str) -> None:
    names = [name for name in FIXTURES if feature != "asks_for_strong_typing" or not name.startswith("rtx")]
    shown = {name: SHOWN[feature](fixture(name)["enums"]) for name in names}
    assert shown == {name: has(feature, backend_of(name), fixture(name)["version"]) for name in names}


@pytest.mark.parametrize("name", FIXTURES)
def test_what_the_worker_uses_is_in_every_version(name: str) -> None:
    found: dict[str, Any] = fixture(name)
    enums = found["enums"]
    assert set(enums["BuilderFlag"]) >= USED_FLAGS
    assert "WORKSPACE" in enums["MemoryPoolType"]
    assert {"GPU", "DLA"} <= set(enums["DeviceType"])
    assert "AMPERE_PLUS" in enums["HardwareCompatibilityLevel"]
    assert "DETAILED" in enums["ProfilingVerbosity"]
    assert "JSON" in enums["LayerInformationFormat"]
    assert "STRONGLY_TYPED" in enums["NetworkDefinitionCreationFlag"]
    assert {kind: used - set(found["classes"][kind]) for kind, used in USED.items()} == {kind: set() for kind in USED}
    assert found["classes"]["IBuilderConfig"]["set_timing_cache"] == [["cache", "ignore_mismatch"]]
    assert found["classes"]["IBuilderConfig"]["create_timing_cache"] == [["serialized_timing_cache"]]
    assert found["classes"]["IBuilderConfig"]["set_memory_pool_limit"] == [["pool", "pool_size"]]


def test_what_no_version_has() -> None:
    """Nothing holds a 2-bit type: such codes travel in a wider one."""
    for name in FIXTURES:
        assert not {"INT2", "UINT2", "UINT4"} & set(fixture(name)["enums"]["DataType"])


def test_the_sms_that_tensorrt_rtx_generates_code_for() -> None:
    (name,) = (name for name in FIXTURES if name.startswith("rtx"))
    listed = {member for member in fixture(name)["enums"]["ComputeCapability"] if member.startswith("SM")}
    assert listed == {f"SM{major}{minor}" for major, minor in BACKENDS["tensorrt-rtx"].ahead_of_time}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.16.1.11", (10, 16, 1, 11)), ("11", (11,)), ("11.0rc1", (11, 0)), ("10.3.0+cuda12", (10, 3, 0)), ("", ()),
     ("9" * 5000 + ".1", (10**9, 1))],
)  # fmt: skip
def test_versions_compare(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers
