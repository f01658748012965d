"""What the worker calls in TensorRT 10.3 to 11.4, with Polygraphy's own code, against the bindings of each version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slope_compile.build.worker import Request
from slope_compile.targets.options import Options

TARGETS = Path(__file__).parents[1] / "targets"
VERSIONS = ("10.3.0", "10.7.0", "10.16.1.11", "11.0.0.114", "11.4.0.106")  # a process each; test_versions.py has all
PROFILE = {"x": ([1, 4], [2, 4], [4, 4])}
# Many requests in one process: the imports cost more than the calls.
CODE = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
from strict_trt import StrictModule, fixture
trt = sys.modules["tensorrt"] = StrictModule(fixture(f"tensorrt-{sys.argv[2]}"))
x = types.SimpleNamespace(name="x", shape=(-1, 4), is_shape_tensor=False, dtype=trt.DataType.FLOAT)
loaded, cache = trt.ICudaEngine(), trt.ITimingCache()
trt.answers |= {
    "Builder.create_network": lambda **_: trt.INetworkDefinition(),
    "Builder.create_builder_config": lambda: trt.IBuilderConfig(),
    "Builder.create_optimization_profile": lambda: trt.IOptimizationProfile(),
    "Builder.build_serialized_network": b"engine",
    "INetworkDefinition.num_inputs": 1, "INetworkDefinition.num_outputs": 1, "INetworkDefinition.num_layers": 0,
    "INetworkDefinition.get_input": lambda **_: x, "INetworkDefinition.get_output": lambda **_: x,
    "IOptimizationProfile.get_shape": lambda **_: [(1, 4), (2, 4), (4, 4)],
    "IBuilderConfig.add_optimization_profile": 0, "IBuilderConfig.DLA_core": -1, "IBuilderConfig.get_flag": False,
    "IBuilderConfig.default_device_type": trt.DeviceType.GPU, "IBuilderConfig.get_memory_pool_limit": 0,
    "IBuilderConfig.get_preview_feature": False, "IBuilderConfig.get_tactic_sources": 0,
    "IBuilderConfig.get_quantization_flag": False, "IBuilderConfig.num_optimization_profiles": 1,
    "IBuilderConfig.engine_capability": trt.EngineCapability.STANDARD, "IBuilderConfig.flags": 0,
    "IBuilderConfig.profiling_verbosity": trt.ProfilingVerbosity.DETAILED, "Builder.num_DLA_cores": 2,
    "IBuilderConfig.create_timing_cache": cache, "IBuilderConfig.get_timing_cache": cache,
    "IBuilderConfig.set_timing_cache": True,
    "ITimingCache.serialize": b"measured", "OnnxParser.parse_from_file": True,
    "Runtime.deserialize_cuda_engine": loaded, "ICudaEngine.create_engine_inspector": lambda: trt.EngineInspector(),
    "EngineInspector.get_engine_information": '{"Layers": []}',
}
type(trt.INetworkDefinition()).__len__ = lambda self: 0
type(trt.INetworkDefinition()).__iter__ = lambda self: iter(())
for name in ("INetworkDefinition", "IBuilderConfig", "Builder"):
    setattr(getattr(trt, name), "__bool__", lambda self: True)
from slope_compile.build import worker
from slope_compile.targets.backends import BACKENDS, select_in_polygraphy
from slope_compile.errors import BackendError
assert select_in_polygraphy(BACKENDS["tensorrt"]) is trt
found = []
for line in sys.stdin:
    read = json.loads(line)
    trt.calls.clear()
    for name, value in read["answers"].items():
        trt.answers[name] = value
    try:
        request = worker.Request.from_json(read["request"])
        built = worker.build(request, BACKENDS["tensorrt"], trt, read["cache"].encode())
        result = [built.engine.decode(), built.cache.decode(), built.version, built.inspector]
    except BackendError as error:
        result = error.problem
    found.append([result, [[name, str(value)] for name, value in trt.calls]])
print(json.dumps(found), file=sys.stderr)
"""


def calls_of(version: str, *asked: tuple[Options, str, dict[str, Any]]) -> list[tuple[Any, list[list[str]]]]:
    lines = [
        {
            "request": Request("tensorrt", "m.onnx", (8, 0), PROFILE, True, options).to_json(),
            "cache": cache,
            "answers": a,
        }
        for options, cache, a in asked
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(TARGETS), version],
        input="\n".join(json.dumps(line) for line in lines),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [(result, calls) for result, calls in json.loads(done.stderr.splitlines()[-1])]


ALL = Options(
    workspace=1 << 20, optimization_level=2, version_compatible=True, hardware_compatibility="ampere-plus", refit=True,
    strip=True, dla=1,
)  # fmt: skip


def members(version: str, enum: str) -> list[str]:
    return list(json.loads((TARGETS / "data" / f"bindings-tensorrt-{version}.json").read_text())["enums"][enum])


def flags(calls: list[list[str]]) -> set[str]:
    return {_member(value) for name, value in calls if name == "IBuilderConfig.set_flag"}


def settings(calls: list[list[str]]) -> dict[str, str]:
    """What is set on the config itself, apart from flags, by the name of the property."""
    return {name.split(".")[1].removesuffix(" ="): value for name, value in calls if name.endswith(" =")}


def _member(value: str) -> str:
    return value.split("<")[1].split(":")[0].split(".")[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_is_one_of_the_bindings(version: str) -> None:
    """A name or an argument that a version lacks raises: of ours, and of Polygraphy's on our behalf."""
    (plain, calls), (everything, more), (_, stripped), (unloaded, _), (refused, _) = calls_of(
        version,
        (Options(), "", {}),
        (ALL, "old", {}),
        (Options(strip=True), "", {}),
        (Options(), "", {"Runtime.deserialize_cuda_engine": None}),
        (Options(), "old", {"IBuilderConfig.set_timing_cache": False}),
    )
    assert plain == ["engine", "measured", version, '{"Layers": []}']
    assert flags(calls) == {"SPARSE_WEIGHTS", "TF32"}  # no precision flag, whatever the version
    (created,) = [value for name, value in calls if name == "Builder.create_network"]
    (shape,) = [value for name, value in calls if name == "IOptimizationProfile.set_shape"]
    strongly_typed = 1 << members(version, "NetworkDefinitionCreationFlag").index("STRONGLY_TYPED")
    assert created == str({"flags": strongly_typed if version.startswith("10.") else 0})
    assert shape == "{'input': 'x', 'min': (1, 4), 'opt': (2, 4), 'max': (4, 4)}"
    detailed = str(members(version, "ProfilingVerbosity").index("DETAILED"))
    assert settings(calls) == {"profiling_verbosity": detailed, "engine_host_code_allowed": "False"}

    assert everything == ["engine", "measured", version, ""]  # an engine without weights is not inspected
    assert flags(more) == {"SPARSE_WEIGHTS", "TF32", "REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE", "GPU_FALLBACK"}
    assert settings(more) == {
        "profiling_verbosity": detailed, "builder_optimization_level": "2", "hardware_compatibility_level": "1",
        "default_device_type": "1", "DLA_core": "1",
    }  # fmt: skip
    (limit,) = [value for name, value in more if name == "IBuilderConfig.set_memory_pool_limit"]
    assert "WORKSPACE" in limit
    assert "1048576" in limit
    taken = [value for name, value in more if name == "IBuilderConfig.create_timing_cache"]
    assert taken[-1] == "{'serialized_timing_cache': b'old'}"
    assert refused.startswith(f"TensorRT {version} refuses the timing cache")
    # a stripped engine is refitted with the same weights, unless it is to take others; what does not load is told
    assert flags(stripped) == {"SPARSE_WEIGHTS", "TF32", "STRIP_PLAN", "REFIT_IDENTICAL"}
    assert unloaded.startswith("TensorRT does not load the engine that it built")
