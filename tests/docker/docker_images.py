"""What the files in docker/ say, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows: (word, the rest of the line)."""

    base: str
    name: str
    lines: tuple[tuple[str, str], ...]

    def all(self, word: str) -> list[str]:
        return [rest for found, rest in self.lines if found == word]


def stages(path: Path = DOCKER / "Dockerfile") -> list[Stage]:
    """The stages of a Dockerfile: comments dropped, continued lines joined."""
    kept = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    lines = [line for line in re.sub(r"\\\n\s*", "", "\n".join(kept)).splitlines() if line]
    found: list[Stage] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(base, name, ()))
        elif found:
            found[-1] = Stage(found[-1].base, found[-1].name, (*found[-1].lines, (word, rest)))
    return found


def compose() -> dict[str, dict[str, object]]:
    """The services of compose.yaml."""
    services: dict[str, dict[str, object]] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    return services


def bases() -> dict[str, str]:
    """service -> the image it is built on."""
    return {name: service["build"]["args"]["BASE"] for name, service in compose().items()}  # type: ignore[index]


@dataclass(frozen=True)
class Pin:
    """One requirement of a pins file."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


def pins(path: Path) -> list[Pin]:
    """Every requirement of a file that `uv pip compile --generate-hashes` wrote."""
    found = []
    for line in re.sub(r"\\\n\s*", "", path.read_text()).splitlines():
        requirement, *hashes = line.split(" --hash=")
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9.]+) ; (.+?) *", requirement)
        assert match, f"{path.name}: not a pinned requirement: {line[:80]}"
        found.append(Pin(match[1], match[2], match[3], tuple(hashes)))
    return found
