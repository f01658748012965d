"""No Docker daemon here: the image's file is linted, its RUN lines are run, what it promises is compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from docker_images import DOCKER, ROOT, bases, stages

BUILDER, FINAL = stages()


def test_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = [hadolint, "--no-color", DOCKER / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_two_stages_on_one_base_that_a_service_has() -> None:
    assert (BUILDER.base, BUILDER.name, FINAL.base) == ("${BASE}", "builder", "${BASE}")
    default = re.findall(r"^ARG BASE=(\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert default == [bases()["a100-trt10"]]


def test_the_final_stage_takes_the_packages_and_nothing_they_were_made_with() -> None:
    assert FINAL.all("COPY") == ["--from=builder /opt/slope /opt/slope"]
    assert not any(word in line for line in FINAL.all("RUN") for word in ("apt-get", "pip", "curl"))
    assert FINAL.all("ENV") == ["PATH=/opt/slope/bin:$PATH"]


def test_every_package_comes_from_the_pins_with_its_hash() -> None:
    installs = [part for line in BUILDER.all("RUN") for part in line.split(" && ") if "pip install" in part]
    for part in installs:
        offline = "--no-deps --no-index /wheels" in part
        assert offline or ("--require-hashes --only-binary=:all: -r /pins/" in part), part
    assert [re.findall(r"-r /pins/(\S+)", part) for part in installs] == [
        ["requirements-build.txt"],
        ["requirements-device.txt"],
        [],
    ]


def test_it_runs_our_command_and_not_as_root() -> None:
    assert FINAL.all("ENTRYPOINT") == ['["slope-compile"]']
    assert FINAL.all("WORKDIR") == ["/runs"]
    (check,) = FINAL.all("HEALTHCHECK")
    assert check.endswith('CMD ["slope-compile", "doctor"]')
    (user,) = FINAL.all("USER")
    assert user == "10001"
    assert any(f"useradd --no-log-init --create-home --uid {user} " in line for line in FINAL.all("RUN"))


def test_the_labels_are_those_of_the_oci() -> None:
    (labels,) = FINAL.all("LABEL")
    keys = re.findall(r"org\.opencontainers\.image\.([\w.]+)=", labels)
    assert keys == ["title", "description", "licenses", "base.name"]
    assert labels.count("=") == len(keys)
    assert FINAL.all("ARG") == ["BASE"]  # so that the label can tell it


def test_what_it_copies_is_there_and_reaches_the_builder() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for line in BUILDER.all("COPY") for source in line.split()[:-1]}
    assert "*" in ignore and copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert {"slope_compile", "cli", "pyproject.toml"} <= copied


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the builder's COPY and RUN lines were done, below it instead of below /.

    The pins are not installed: their packages are those of this environment, so that no network is asked.
    """
    root = tmp_path_factory.mktemp("image")
    (root / "src").mkdir()
    for source in ("pyproject.toml", "README.md", "LICENSE", "slope_compile", "cli"):
        (root / "src" / source).symlink_to(ROOT / source)
    for line in BUILDER.all("RUN"):
        done = sh(" && ".join(part for part in line.split(" && ") if "-r /pins/" not in part), root)
        assert done.returncode == 0, done.stdout + done.stderr
    return root


def sh(line: str, root: Path, *more: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a Dockerfile below `root`, with this environment's packages (but ours), `more` before them."""
    here = re.sub(r"/(opt|pins|src|wheels|runs)\b", rf"{root}/\1", line)
    environment = {
        "PATH": os.pathsep.join([f"{root}/opt/slope/bin", f"{sys.base_prefix}/bin", os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, [*more, sysconfig.get_path("purelib")])),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    return subprocess.run(["sh", "-ec", here], cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_its_run_lines_make_a_command_that_is_healthy(image: Path) -> None:
    (check,) = FINAL.all("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    done = sh(" ".join(command), image)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a100" in done.stdout and "healthy: yes" in done.stdout
    where = sh("python3 -c 'import slope_compile; print(slope_compile.__file__)'", image).stdout
    assert where.startswith(f"{image}/opt/slope/lib/")


def test_a_base_without_tensorrt_is_refused_while_building(image: Path, tmp_path: Path) -> None:
    look = FINAL.all("RUN")[0].split(" && ")[0]
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvdla_compiler.so: the host has it')\n")
    assert sh(look, image, tmp_path).returncode == 0
    without = sh(look, image)
    assert without.returncode == 1 and "BASE has no Python bindings of TensorRT" in without.stderr


def test_readme_names_every_base_and_what_is_not_checked() -> None:
    text = (DOCKER / "README.md").read_text()
    assert "not checked" in text
    for service, base in bases().items():
        assert f"`{service}`" in text and base in text
