"""The two guides to devices agree with the targets and with docker/compose.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from slope_compile.targets.target import TARGETS

ROOT = Path(__file__).parents[2]
SERVICES = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]


def guide(name: str) -> str:
    return (ROOT / "docs" / f"deploy-{name}.md").read_text(encoding="utf-8")


def rows(name: str) -> list[list[str]]:
    """The cells of the guide's first table."""
    table = guide(name).partition("\n\n|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("name", ["a100", "jetson"])
def test_it_names_every_image_of_its_machines_with_its_base(name: str) -> None:
    text = guide(name)
    mine = {service: fields for service, fields in SERVICES.items() if service.startswith(name)}
    assert len(mine) == 2
    for service, fields in mine.items():
        assert f"`{service}`, on `{fields['build']['args']['BASE']}`" in text


def test_every_tensorrt_of_the_jetson_s_table_runs_on_the_targets_beside_it() -> None:
    table = rows("jetson")
    assert len(table) == 4
    for jetpack, _, devices, tensorrt, _, asked, _ in table:
        version = tensorrt.partition(",")[0]
        assert asked.strip("`") == version or asked.startswith("–")
        for target in devices.split("`")[1::2]:
            system = TARGETS[target].system_of(version)
            assert system is not None and jetpack.startswith(system.removeprefix("JetPack ")), (target, version)
    assert all(row.first == "10.3" for row in (TARGETS["orin"].tensorrt[0], TARGETS["orin-nano"].tensorrt[0]))


def test_every_tensorrt_of_the_a100_s_table_runs_there() -> None:
    table = rows("a100")
    assert len(table) == 2
    for version, *_ in table:
        assert TARGETS["a100"].system_of(version)


@pytest.mark.parametrize("name", ["a100", "jetson"])
def test_it_says_what_is_not_checked_and_that_clocks_are_the_user_s(name: str) -> None:
    text = guide(name)
    assert "## Not checked" in text and "never sets them" in text
