"""The pins of the image cover what pyproject.toml asks for, on every Python from 3.10 on, each with its hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomllib
from docker_images import DOCKER, ROOT, Pin, pins
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
WANTED = {
    "requirements-device.txt": PROJECT["project"]["dependencies"],
    "requirements-build.txt": PROJECT["build-system"]["requires"],
}
PYTHONS = ("3.10.12", "3.11.9", "3.12.3", "3.13.5")


@pytest.fixture(params=WANTED)
def path(request: pytest.FixtureRequest) -> Path:
    return DOCKER / str(request.param)


def environment(python: str, machine: str = "aarch64") -> dict[str, str]:
    """The markers' variables on a device with that Python."""
    found = {key: str(value) for key, value in default_environment().items()}
    short = ".".join(python.split(".")[:2])
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": machine}
    return found | linux | {"python_version": short, "python_full_version": python}


def taken(path: Path, python: str) -> dict[str, Pin]:
    """name -> the pin that pip takes there; more than one is an error of the file."""
    found: dict[str, Pin] = {}
    for pin in pins(path):
        if Marker(pin.marker).evaluate(environment(python)):
            assert pin.name not in found, f"{pin.name} twice on {python}"
            found[pin.name] = pin
    return found


def test_every_pin_has_hashes_and_no_index_is_named(path: Path) -> None:
    rows = pins(path)
    assert rows
    for pin in rows:
        assert pin.hashes, pin.name
        assert all(len(one) == 71 and one.startswith("sha256:") for one in pin.hashes), pin.name
    text = path.read_text()
    assert "://" not in text and "index" not in text and " @ " not in text


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_satisfy_the_project(path: Path, python: str) -> None:
    here = taken(path, python)
    for text in WANTED[path.name]:
        wanted = Requirement(text)
        name = wanted.name.lower().replace("_", "-")
        assert name in here, f"{name} is not pinned on {python}: make lock"
        assert Version(here[name].version) in wanted.specifier, f"{name} {here[name].version} on {python}: make lock"


def test_jetpack_6_keeps_the_numpy_that_its_bindings_were_made_for() -> None:
    assert taken(DOCKER / "requirements-device.txt", "3.10.12")["numpy"].version.startswith("1.")


def test_no_pin_brings_torch_or_a_gpu() -> None:
    names = {pin.name for pin in pins(DOCKER / "requirements-device.txt")}
    assert not {name for name in names if name.startswith(("torch", "nvidia", "tensorrt", "cuda"))}


def test_the_project_is_for_these_pythons() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.10"
    assert PROJECT["tool"]["uv"]["environments"] == ["sys_platform == 'linux'"]
