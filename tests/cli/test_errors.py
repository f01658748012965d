"""What bad input gets: exit 2, one paragraph that names the value and the remedy, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.e2e


def refused(done: Any, *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in " ".join(done.stderr.split()), done.stderr


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder of three classes, in files that a person would have."""
    for index in range(36):
        folder = tmp_path / "pets" / ("ant", "bee", "cat")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shade = (index % 3) * 80 + index
        Image.new("RGB", (12, 10), (shade, 255 - shade, index)).save(folder / f"{index}.png")
    return tmp_path


def place(folder: Path, workplace: Path) -> Path:
    shutil.copy(workplace / "tiny.py", folder)
    shutil.copy(workplace / "tiny.yaml", folder)
    return folder


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("compression.bit=2", ["compression.bit", "Did you mean 'bits'?"]),
        ("model.name=torchvision/resnet81", ["resnet81", "resnet18"]),
        ("model.name=timm/resnet81", ["resnet81"]),
        ("model.name=tiny.py:tyni", ["tyni", "tiny"]),
        ("model.name=nothere.py:tiny", ["nothere.py"]),
        ("data.source=digits", ["model.classes is 4", "digits has 10 classes"]),
        ("data.source=imagefolder:nowhere", ["nowhere"]),
        ("data.source=digit", ["digit", "Did you mean 'digits'"]),
        ("compression.overrides={nolayer: off}", ["nolayer"]),
        ("build.targets=[a10]", ["a10", "Did you mean 'a100'?"]),
    ],
)
def test_a_wrong_value_is_named_with_the_remedy(
    tmp_path: Path, workplace: Path, cli: Any, setting: str, words: list[str]
) -> None:
    done = cli(
        "run",
        "tiny.yaml",
        "--set",
        setting,
        "--set",
        "train.pretrain_epochs=0",
        "--set",
        "train.epochs=1",
        cwd=place(tmp_path, workplace),
    )
    refused(done, *words)


def test_json_errors_are_one_object(tmp_path: Path, cli: Any) -> None:
    done = cli("run", "digits-resnet81", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["error"]["exit_code"] == done.returncode == 2
    assert "Did you mean 'digits-resnet18'?" in told["error"]["remedy"]
    assert json.loads(cli("run", "--json", cwd=tmp_path).stdout)["error"]["exit_code"] == 2


def test_an_empty_data_folder(tmp_path: Path, workplace: Path, cli: Any) -> None:
    (tmp_path / "empty").mkdir()
    done = cli("train", "tiny.yaml", "--set", "data.source=imagefolder:empty", cwd=place(tmp_path, workplace))
    refused(done, "empty")


def test_an_image_that_does_not_decode_is_refused_or_skipped_by_name(images: Path, workplace: Path, cli: Any) -> None:
    (images / "pets/bee/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    place(images, workplace)
    sets = [
        "--set",
        "data.source=imagefolder:pets",
        "--set",
        "model.classes=null",
        "--set",
        "train.epochs=1",
        "--set",
        "train.pretrain_epochs=0",
    ]
    refused(cli("train", "tiny.yaml", *sets, cwd=images), "broken.png", "data.bad_images")
    done = cli("train", "tiny.yaml", *sets, "--set", "data.bad_images=skip", "--out", "r", cwd=images)
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stderr


def test_a_model_with_no_compressible_layer(tmp_path: Path, workplace: Path, cli: Any) -> None:
    place(tmp_path, workplace)
    (tmp_path / "flat.py").write_text(
        "from torch import nn\n\n"
        "def flat(classes):\n"
        "    pool = nn.AdaptiveAvgPool2d((1, classes))\n"
        "    return nn.Sequential(pool, nn.AvgPool3d((3, 1, 1)), nn.Flatten(), nn.LayerNorm(classes))\n"
    )
    refused(
        cli("train", "tiny.yaml", "--set", "model.name=flat.py:flat", cwd=tmp_path),
        "No layer of Sequential can be compressed",
    )


def test_nan_loss_stops_and_says_where(tmp_path: Path, workplace: Path, cli: Any) -> None:
    done = cli("train", "tiny.yaml", "--set", "train.pretrain_lr=1e30", cwd=place(tmp_path, workplace))
    refused(done, "epoch", "lr")


def test_an_unwritable_place(tmp_path: Path, workplace: Path, cli: Any) -> None:
    place(tmp_path, workplace)
    (tmp_path / "file").write_text("not a folder")
    refused(cli("train", "tiny.yaml", "--out", "file/run", cwd=tmp_path), "file")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not Path("/dev/full").exists(),
    reason="needs root to mount a small file system",
)
def test_a_full_disk_leaves_the_old_run_intact(copy: Path, tmp_path: Path, cli: Any) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this sandbox does not let us mount a small file system")
    try:
        shutil.copytree(copy / "runs/tiny", small / "tiny")
        (small / "filler").write_bytes(b"x" * (shutil.disk_usage(small).free - 8192))
        before = (small / "tiny/export/model.onnx").read_bytes()
        done = cli("export", str(small / "tiny"), "--force", cwd=copy)
        refused(done, "MiB free", "Free some space")
        assert (small / "tiny/export/model.onnx").read_bytes() == before
        assert cli("inspect", str(small / "tiny"), cwd=copy).returncode == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_exit_codes_of_usage(tmp_path: Path, cli: Any) -> None:
    for arguments in (
        ["biuld"],
        ["run"],
        ["run", "x", "--nope"],
        ["verify", "nowhere"],
        ["build", "nowhere.onnx"],
        ["inspect", "nowhere"],
    ):
        done = cli(*arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert cli("--version", cwd=tmp_path).returncode == 0


def test_a_bug_exits_101_with_how_to_report_it(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['slope-compile', 'doctor']\n"
        "from slope_compile import machine\n"
        "def broken(): raise RuntimeError('boom')\n"
        "machine.versions = broken\n"
        "from slope_compile_cli.entry import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 101
    assert "boom" in done.stderr
    assert "doctor" in done.stderr


def test_recipes_ls_show_cp(tmp_path: Path, cli: Any) -> None:
    assert "digits-resnet18" in cli("recipes", "ls", cwd=tmp_path).stdout
    assert cli("recipes", "cp", "digits-resnet18", "mine.yaml", cwd=tmp_path).returncode == 0
    assert (tmp_path / "mine.yaml").read_text() == cli("recipes", "show", "digits-resnet18", cwd=tmp_path).stdout
    refused(cli("recipes", "cp", "digits-resnet18", "mine.yaml", cwd=tmp_path), "mine.yaml exists")
