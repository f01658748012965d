"""What is refused before anything is built: each rule with its reason, and where the same key is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from slope_compile.errors import BackendError
from slope_compile.recipe import BuildSection
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.gpu import Gpu
from slope_compile.targets.refusals import notes, require_buildable, require_possible
from slope_compile.targets.target import find_target

TENSORRT, RTX = BACKENDS["tensorrt"], BACKENDS["tensorrt-rtx"]
PLAIN = BuildSection()
A100, RTX_4090, ORIN = Gpu("A100", (8, 0)), Gpu("RTX 4090", (8, 9)), Gpu("Orin", (8, 7))
ONE = {"min": 1, "opt": 1, "max": 1}


def possible(target: str, backend: str = "tensorrt", version: str = "10.3.0", **keys: Any) -> None:
    require_possible(BuildSection(**keys), find_target(target), BACKENDS[backend], version)


@pytest.mark.parametrize("target", ["a100", "l4", "rtx-turing", "rtx-ampere", "rtx-ada", "rtx-blackwell", "gb10"])
def test_rtx_builds_ahead_of_time(target: str) -> None:
    require_buildable(PLAIN, find_target(target), RTX, "1.7.1", None)


@pytest.mark.parametrize(("target", "sm"), [("orin", "8.7"), ("orin-nano", "8.7"), ("thor", "11.0"), ("h100", "9.0")])
def test_rtx_has_no_code_for_it(target: str, sm: str) -> None:
    with pytest.raises(BackendError, match=f"no code generator for SM {sm}") as caught:
        require_buildable(PLAIN, find_target(target), RTX, "1.7.1", None)
    assert (f"slope-compile bundle RUN --target {target}" in caught.value.remedy) == find_target(target).on_device


def test_tensorrt_builds_for_the_gpu_that_is_here() -> None:
    require_buildable(PLAIN, find_target("a100"), TENSORRT, "10.3.0", A100)
    require_buildable(PLAIN, find_target("orin"), TENSORRT, "10.3.0", ORIN)
    with pytest.raises(BackendError, match=r"which is RTX 4090 \(SM 8.9\), not a100 \(SM 8.0") as caught:
        require_buildable(PLAIN, find_target("a100"), TENSORRT, "10.3.0", RTX_4090)
    assert "tensorrt-rtx" in caught.value.remedy
    with pytest.raises(BackendError, match="there is none here") as caught:
        require_buildable(PLAIN, find_target("thor"), TENSORRT, "10.13.0", None)
    assert "tensorrt-rtx" not in caught.value.remedy  # it has no SM 11.0 either


@pytest.mark.parametrize(
    ("target", "version", "what"),
    [("orin", "11.0.0", "JetPack 6: 10.3 to below 10.8"), ("orin-nano", "11.4.1", "JetPack 7.2: 10.16"),
     ("thor", "10.3.0", "JetPack 7.0: 10.13"), ("a100", "8.6.1", "server: 10.3")],
)  # fmt: skip
def test_a_tensorrt_that_does_not_run_there(target: str, version: str, what: str) -> None:
    with pytest.raises(BackendError, match=f"TensorRT {version} does not run on {target}.*{what}"):
        possible(target, version=version)


@pytest.mark.parametrize(
    ("target", "version", "keys", "what"),
    [("a100", "10.3.0", {"dla": 0}, r"a100 \(.*has no DLA"), ("thor", "10.13.0", {"dla": 0}, "has no DLA"),
     ("orin-nano", "10.3.0", {"dla": 0}, "has no DLA"), ("orin", "10.3.0", {"dla": 2}, "cores of orin .* are 0 to 1"),
     ("orin", "10.16.1", {"dla": 0}, "TensorRT 10.16.1 has no DLA: 10.7 was the last before 11.4.1"),
     ("orin", "10.3.0", {"dla": 0}, "takes one batch size, and `build.batch` is 1, 1, 64")],
)  # fmt: skip
def test_dla(target: str, version: str, keys: dict[str, Any], what: str) -> None:
    with pytest.raises(BackendError, match=what):
        possible(target, version=version, **keys)


@pytest.mark.parametrize("version", ["10.3.0", "10.7.0", "11.4.1"])
def test_dla_on_orin(version: str) -> None:
    possible("orin", version=version, dla=1, batch=ONE)


@pytest.mark.parametrize(
    ("target", "version", "level", "what"),
    [("orin", "10.3.0", "ampere-plus", "not supported on Jetson"),
     ("rtx-turing", "10.3.0", "ampere-plus", "needs a GPU of SM 8.0 or later"),
     ("a100", "10.8.0", "same-compute-capability", "TensorRT 10.8.0 does not know")],
)  # fmt: skip
def test_hardware_compatibility(target: str, version: str, level: str, what: str) -> None:
    with pytest.raises(BackendError, match=what):
        possible(target, version=version, hardware_compatibility=level)


def test_hardware_compatibility_where_it_works() -> None:
    possible("a100", hardware_compatibility="ampere-plus")
    possible("rtx-turing", version="10.9.0", hardware_compatibility="same-compute-capability")


@pytest.mark.parametrize(
    ("key", "value"),
    [("timing_cache", "t.cache"), ("version_compatible", True), ("hardware_compatibility", "ampere-plus")],
)
def test_what_does_nothing_in_tensorrt_rtx(key: str, value: Any) -> None:
    with pytest.raises(BackendError, match=f"`build.{key}` is .*TensorRT-RTX does not take it"):
        possible("a100", "tensorrt-rtx", "1.7.1", **{key: value})
    possible("a100", **{key: value})


def test_every_refused_key_is_one_of_the_recipe() -> None:
    assert all(set(backend.refused) <= set(BuildSection.model_fields) for backend in BACKENDS.values())


@pytest.mark.parametrize("key", ["refit", "strip"])
def test_rtx_compiles_refittable_engines_on_a_gpu_only(key: str) -> None:
    section = BuildSection(**{key: True})
    with pytest.raises(BackendError, match=f"`build.{key}` on a GPU only"):
        require_buildable(section, find_target("rtx-ada"), RTX, "1.7.1", None)
    require_buildable(section, find_target("rtx-ada"), RTX, "1.7.1", RTX_4090)
    require_possible(section, find_target("rtx-ada"), RTX, "1.7.1")


def test_a_workspace_that_the_device_does_not_have() -> None:
    with pytest.raises(BackendError, match=r"`build.workspace_gib` is 9, and orin-nano .* has 8 GiB"):
        possible("orin-nano", workspace_gib=9)
    possible("orin-nano", workspace_gib=8)


@pytest.mark.parametrize(
    ("target", "backend", "version", "keys", "sparse", "what"),
    [("a100", RTX, "1.7.1", {}, True, "its support matrix does not name that GPU"),
     ("rtx-turing", TENSORRT, "10.3.0", {}, True, "no sparse tensor cores"),
     ("a100", TENSORRT, "10.3.0", {"refit": True}, True, "refitted with 2:4 weights only"),
     ("a100", TENSORRT, "11.3.0", {"refit": True}, False, "may drop a GEMM's bias"),
     ("orin", TENSORRT, "10.3.0", {"dla": 0}, False, "falls back to the GPU")],
)  # fmt: skip
def test_notes(target: str, backend: Any, version: str, keys: dict[str, Any], sparse: bool, what: str) -> None:
    (found,) = notes(BuildSection(**keys), find_target(target), backend, version, sparse, {"INT4"})
    assert what in found


def test_nothing_to_note() -> None:
    assert notes(BuildSection(refit=True), find_target("a100"), TENSORRT, "11.4.0", False, {"INT4", "FLOAT"}) == []


def test_2_bit_types_have_no_path() -> None:
    (found,) = notes(PLAIN, find_target("a100"), TENSORRT, "11.4.0", False, {"INT2", "INT8"})
    assert "INT2 codes travel in a wider type" in found
