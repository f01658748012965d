from __future__ import annotations

import dataclasses

import pytest

from slope_compile.errors import BackendError
from slope_compile.targets.target import TARGETS, find_target


@pytest.mark.parametrize(
    ("name", "sm"),
    [("a100", (8, 0)), ("rtx-turing", (7, 5)), ("rtx-ampere", (8, 6)), ("rtx-ada", (8, 9)), ("rtx-blackwell", (12, 0)),
     ("gb10", (12, 1)), ("orin", (8, 7)), ("thor", (11, 0))],
)  # fmt: skip
def test_compute_capabilities(name: str, sm: tuple[int, int]) -> None:
    assert find_target(name).sm == sm


def test_every_name_is_its_key() -> None:
    assert all(TARGETS[name].name == name for name in TARGETS)


@pytest.mark.parametrize(("wrong", "near"), [("a10", "a100"), ("rtx-blackwel", "rtx-blackwell"), ("Orin", "orin")])
def test_misspelt(wrong: str, near: str) -> None:
    with pytest.raises(BackendError, match=f"no target '{wrong}'. Did you mean '{near}'"):
        find_target(wrong)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_target("a100").sm = (9, 0)  # type: ignore[misc]
