"""The TensorRT that a file is judged for before there is one."""

from __future__ import annotations

import pytest

from slope_compile.lint.assumed import NEWEST, assumed_version
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.target import TARGETS, find_target


@pytest.mark.parametrize(
    ("target", "backend", "version"),
    [
        ("a100", "tensorrt", "11.4.1"),
        ("orin", "tensorrt", "10.3"),  # what a bundle is planned for
        ("orin-nano", "tensorrt", "10.3"),
        ("a100", "tensorrt-rtx", "1.7.1"),
    ],
)
def test_assumed_version(target: str, backend: str, version: str) -> None:
    assert assumed_version(find_target(target), BACKENDS[backend]) == version


def test_every_target_runs_what_is_assumed() -> None:
    assert set(NEWEST) == set(BACKENDS)
    for target in TARGETS.values():
        assert target.system_of(assumed_version(target, BACKENDS["tensorrt"])) is not None
