"""compose.yaml: services that Docker Compose would take, on pinned images of the vendor's, with few rights."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import yaml
from docker_images import DOCKER, ROOT, bases
from pydantic import BaseModel, ConfigDict

from slope_compile.targets.target import TARGETS
from slope_compile.targets.versions import parse_version


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Build(Strict):
    context: Literal[".."]
    dockerfile: str
    args: dict[str, str]


class Device(Strict):
    driver: Literal["nvidia"]
    count: int
    capabilities: list[Literal["gpu"]]


class Reservations(Strict):
    devices: list[Device]


class Resources(Strict):
    reservations: Reservations


class Deploy(Strict):
    resources: Resources


class Service(Strict):
    """The part of the Compose specification that the file uses."""

    image: str
    build: Build
    command: list[str]
    init: bool
    cap_drop: list[str]
    security_opt: list[str]
    volumes: list[str]
    platform: Literal["linux/amd64", "linux/arm64"]
    deploy: Deploy | None = None
    runtime: Literal["nvidia"] | None = None
    group_add: list[str] = []


class File(Strict):
    name: str
    services: dict[str, Service]


def read() -> File:
    text = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return File(**{key: value for key, value in text.items() if not key.startswith("x-")})


SERVICES = read().services
RUNS_ON = (  # service, target
    ("a100-trt10", "a100"), ("a100-trt11", "a100"), ("jetson-jp6", "orin"), ("jetson-jp6", "orin-nano"),
    ("jetson-jp7", "orin"), ("jetson-jp7", "orin-nano"), ("jetson-jp7", "thor"),
)  # fmt: skip


@pytest.fixture(params=SERVICES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert list(SERVICES) == ["a100-trt10", "a100-trt11", "jetson-jp6", "jetson-jp7"]


def test_it_is_built_from_our_file_on_a_pinned_image(name: str) -> None:
    service = SERVICES[name]
    assert service.image == f"slope-compile:{name}"
    assert (DOCKER / service.build.context / service.build.dockerfile).resolve() == ROOT / "docker/Dockerfile"
    assert list(service.build.args) == ["BASE"]
    assert re.fullmatch(r"nvcr\.io/nvidia/(tensorrt:\d\d\.\d\d-py3|l4t-tensorrt:r\d+\.\d+\.\d+-runtime)", bases()[name])


def test_it_sees_the_gpu_as_its_machine_gives_it(name: str) -> None:
    service = SERVICES[name]
    if name.startswith("jetson"):
        assert (service.platform, service.runtime, service.deploy) == ("linux/arm64", "nvidia", None)
        assert service.group_add == ["video"]
    else:
        assert (service.platform, service.runtime) == ("linux/amd64", None)
        assert service.deploy is not None and len(service.deploy.resources.reservations.devices) == 1


def test_it_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service.cap_drop == ["ALL"] and service.security_opt == ["no-new-privileges:true"]
    assert service.volumes == ["${RUNS:-../runs}:/runs"]
    assert service.command == ["doctor"]


def test_the_targets_name_the_same_images() -> None:
    images = {target: bases()[service] for service, target in reversed(RUNS_ON)}  # of several, the first
    assert {name: TARGETS[name].container for name in images} == images


def test_the_tensorrts_that_it_speaks_of_run_on_their_targets() -> None:
    comments = re.findall(r"# .*?TensorRT ([\d.]+),.*\n  ([\w-]+):\n", (DOCKER / "compose.yaml").read_text())
    told = {service: parse_version(version) for version, service in comments}
    assert set(told) == set(SERVICES)
    for service, name in RUNS_ON:
        assert TARGETS[name].system_of(".".join(map(str, told[service]))), (service, name)
    assert [told[name][0] for name in SERVICES] == [10, 11, 10, 10]
