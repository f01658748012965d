from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slope_compile.build.timing import keep_cache, starting_cache
from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.gpu import Gpu

TENSORRT, RTX = BACKENDS["tensorrt"], BACKENDS["tensorrt-rtx"]
A100, A30 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0)), Gpu("NVIDIA A30", (8, 0))


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """The folder of a build by TensorRT 10.3.0 on an A100."""
    folder = tmp_path / "last"
    folder.mkdir()
    keep_cache(b"measured", folder, TENSORRT, "10.3.0", A100)
    return folder


def start(asked: Path | None, last: Path | None, version: str = "10.3.0", gpu: Gpu = A100) -> tuple[bytes, list[Any]]:
    said: list[Any] = []
    found = starting_cache(asked and str(asked), last, TENSORRT, version, gpu, Events(listeners=[said.append]))
    return found, [event["text"] for event in said]


def test_kept_with_whose_it_is(last: Path) -> None:
    assert (last / "timing.cache").read_bytes() == b"measured"
    owner = json.loads((last / "timing.json").read_text())
    assert (owner["backend"], owner["version"], owner["gpu"], owner["bytes"]) == ("tensorrt", "10.3.0", str(A100), 8)


def test_a_backend_without_one_leaves_none(tmp_path: Path) -> None:
    keep_cache(b"", tmp_path, RTX, "1.7.1", None)
    assert not list(tmp_path.iterdir())
    assert starting_cache(None, tmp_path, RTX, "1.7.1", None, Events()) == b""


def test_the_last_build_s_is_used_again(last: Path) -> None:
    assert start(None, last) == (b"measured", ["the last build's timing cache is used again"])
    assert start(None, None) == (b"", [])
    assert start(None, last.parent) == (b"", [])


@pytest.mark.parametrize(
    ("version", "gpu", "what"),
    [
        ("10.7.0", A100, "version is 10.3.0, not 10.7.0"),
        ("10.3.0", A30, r"gpu is NVIDIA A100-SXM4-80GB \(SM 8.0\), not"),
    ],
)
def test_one_measured_elsewhere(last: Path, version: str, gpu: Gpu, what: str) -> None:
    found, (said,) = start(None, last, version, gpu)
    assert found == b""
    assert said.startswith("the last build's timing cache is not used: it was measured elsewhere")
    with pytest.raises(ArtifactError, match=f"timing cache .* cannot be used: it was measured elsewhere: .*{what}"):
        start(last / "timing.cache", None, version, gpu)


def test_one_that_was_asked_for(last: Path, tmp_path: Path) -> None:
    assert start(last / "timing.cache", None) == (b"measured", [])
    alone = tmp_path / "trtexec.cache"
    alone.write_bytes(b"whose?")
    assert start(alone, None) == (b"whose?", [])  # nothing says where it was measured: TensorRT itself is asked


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "missing", "folder", "owner", "list", "keys"])
def test_damaged(last: Path, damage: str) -> None:
    cache, owner = last / "timing.cache", last / "timing.json"
    if damage == "changed":
        cache.write_bytes(b"measureD")
    elif damage == "cut":
        cache.write_bytes(b"measu")
    elif damage == "empty":
        cache.write_bytes(b"")
    elif damage in ("missing", "folder"):
        cache.unlink()
        if damage == "folder":
            cache.mkdir()
    else:
        owner.write_text({"owner": "{", "list": "[]", "keys": "{}"}[damage])
    with pytest.raises(ArtifactError, match="cannot be used: ") as caught:
        start(cache, None)
    assert "`build.timing_cache`" in caught.value.remedy
    assert start(None, last)[0] == b""


def test_the_last_build_s_without_an_owner_is_left_out(last: Path) -> None:
    (last / "timing.json").unlink()
    found, (said,) = start(None, last)
    assert found == b""
    assert "timing.json, which says where it was measured, is missing" in said
