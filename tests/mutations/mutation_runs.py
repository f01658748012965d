"""The runs that are corrupted: real ones of a tiny network, made once, and the real command over their copies."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import torch
import typer.main
import yaml
from mutation import Mutation, Outcome, Subject
from slope_compile_cli.main import main

from slope_compile import machine
from slope_compile.artifacts import FILES, LOGS, FileDigest, RunFolder
from slope_compile.verify import model
from slope_compile.verify.laws.digests import check_digests, digests_of
from slope_compile.verify.verdict import Check, attempt

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.act = nn.ReLU()
        self.mix = nn.Linear(32, 32)
        self.mixed = nn.LayerNorm(32)
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        x = self.stem(x)
        x = self.act(x + self.again(self.act(self.norm(self.conv(x)))))
        x = self.act(self.down(x)).flatten(2).transpose(1, 2)
        x = self.mixed(x + self.act(self.mix(x)))
        return self.head(x.mean(1))

def net(classes):
    return Net(classes)
"""
RECIPE = """
model: {{name: "{net}:net", classes: 4}}
data: {{source: fake:200, size: 8, batch: 32, workers: 0, augment: none, validation: 0.1}}
compression: {{granularity: channel, {more}}}
train: {{pretrain_epochs: {pretrain}, epochs: 2, lr: 0.02, pretrain_lr: 0.05, seed: {seed}}}
export: {{samples: 4}}
build: {{batch: {{min: 1, opt: 4, max: 16}}, backend: tensorrt-rtx}}
verify: {{metric_drop: 0.1}}
"""
KINDS = {
    "float": {"more": "first_last_bits: 8", "seed": 0, "pretrain": 4},
    "other": {"more": "first_last_bits: 8", "seed": 1, "pretrain": 0},
    "int8": {"more": "activation_bits: 8, quantize_outputs: true", "seed": 0, "pretrain": 4},
}
REPORT = "slope_compile.pipeline.write_report"
UNTOLD = {
    "slope_compile.verify.model.Layerwise.after": lambda self, check: check,
    "slope_compile.verify.model.Layerwise.write": lambda self: None,
    "slope_compile.verify.model.save_chain": lambda chain, out: None,
    REPORT: lambda folder: None,
    "slope_compile_cli.console.Console.checks": lambda self, verdict: None,
    "polygraphy.comparator.util.log_output_stats": lambda *given, **named: None,
    "polygraphy.comparator.util.log_compared_output_stats": lambda *given, **named: None,
}
# What each command does anew in a process of its own, and always with the same result; and what only power cuts test.
_parsed = cache(yaml.safe_load)
ONCE = {
    "typer.main.get_command": cache(typer.main.get_command),
    "slope_compile.machine.version_of": cache(machine.version_of),
    "yaml.safe_load": lambda text: deepcopy(_parsed(text)),
    "os.fsync": lambda file: None,
}
TARGET = "a100"
STAGES = ("train", "pack", "export", f"build/{TARGET}", "bundle")
PACKED = FILES["pack"]
# Folders of a file without a run, and which file of them is verified
LONE = {"packed": PACKED, "packed onnx": PACKED, "alone": "model.onnx", "alone int8": "model.onnx"}


def command(*arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; returns exit code, stdout and stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["slope-compile", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), replaced(ONCE):
            try:
                main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def make_runs(folder: Path) -> dict[str, Path]:
    """Train, export and build the runs, and bundle one; returns them by name."""
    torch.set_num_threads(1)  # the network is smaller than what starting a thread costs
    (folder / "mutated_net.py").write_text(NET)
    runs = {}
    for name, given in KINDS.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(RECIPE.format(net=folder / "mutated_net.py", **given))
        runs[name] = folder / "runs" / name
        for stage in ("train", "pack", "export", "build"):
            asked = (str(recipe), "--out", str(runs[name])) if stage == "train" else (str(runs[name]),)
            _must(stage, *asked)
    runs["bundle"] = folder / "carried.bundle.zip"
    _must("bundle", str(runs["float"]), "--out", str(runs["bundle"]))
    _must("build", str(runs["bundle"]))
    runs["unpacked"] = folder / "carried"
    runs["external"] = _with_external_data(runs["float"], folder / "runs" / "external")
    runs["unbuilt"] = _without_build(runs["float"], folder / "runs" / "unbuilt")
    runs["unbuilt int8"] = _without_build(runs["int8"], folder / "runs" / "unbuilt-int8")
    for name in LONE:
        runs[name] = folder / name
        runs[name].mkdir()
    shutil.copy(runs["float"] / PACKED, runs["packed"])
    _must("pack", str(runs["float"] / "export/model.onnx"), "--out", str(runs["packed onnx"] / PACKED))
    for name, run in (("alone", "float"), ("alone int8", "int8"), ("packed onnx", "float")):
        for file in ("golden.safetensors", "layers.json"):
            shutil.copy(runs[run] / "export" / file, runs[name] / f"model.{file}")
        if name != "packed onnx":
            shutil.copy(runs[run] / "export/model.onnx", runs[name])
    return runs


def _must(*arguments: str) -> None:
    with replaced({"slope_compile.build.process.MOST_BUILDS": 1}):  # bytes that repeat are another test's business
        code, _, err = command(*arguments)
    if code:
        raise RuntimeError(f"{' '.join(arguments)}: {err}")


def _with_external_data(run: Path, path: Path) -> Path:
    """Copy a run, with the tensors of its model in a file beside it."""
    shutil.copytree(run, path)
    model = onnx.load(path / "export/model.onnx")
    (path / "export/model.onnx").unlink()
    onnx.save(
        model, path / "export/model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=100
    )
    restamp(path)
    return path


def _without_build(run: Path, path: Path) -> Path:
    """Copy a run as it was before an engine was built of it."""
    shutil.copytree(run, path)
    shutil.rmtree(path / "build")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["stages"] = {name: manifest["stages"][name] for name in ("train", "pack", "export")}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def restamp(path: Path, header: bool = True) -> None:
    """Make a manifest match what lies in its folder, as somebody who hides a change would.

    Args:
        path: A run's folder, or a bundle's.
        header: Whether the digests in the engine's layers.json follow too.
    """
    build, onnx_file = path / "build" / TARGET, path / "export/model.onnx"
    if header and (build / "layers.json").is_file() and onnx_file.is_file():
        layers = json.loads((build / "layers.json").read_text())
        layers["header"]["onnx_sha256"] = FileDigest.of(onnx_file).sha256
        (build / "layers.json").write_text(json.dumps(layers))
    manifest = json.loads((path / "manifest.json").read_text())
    for stage in sorted(manifest["stages"].keys() & set(STAGES)):
        made = [path / FILES[stage]] if stage in FILES else sorted((path / stage).rglob("*"))
        files = [file for file in made if file.is_file() and file.name not in LOGS]
        digests = {file.relative_to(path).as_posix(): FileDigest.of(file) for file in files}
        manifest["stages"][stage]["outputs"] = {
            name: {"size": digest.size, "sha256": digest.sha256} for name, digest in digests.items()
        }
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))


@contextlib.contextmanager
def replaced(instead: Mapping[str, Any]) -> Iterator[None]:
    """Put other things in some places, by their dotted names."""
    with contextlib.ExitStack() as stack:
        for place, thing in instead.items():
            stack.enter_context(mock.patch(place, thing))
        yield


@contextlib.contextmanager
def judged_only(report: bool = False) -> Iterator[None]:
    """Leave out what follows a judgement: which layer differs and why, files of the chain, the report, log lines.

    Args:
        report: Write the report all the same: it draws what a mutation of a JSON file may have made senseless.
    """
    with replaced({place: thing for place, thing in UNTOLD.items() if not (report and place == REPORT)}):
        yield


@contextlib.contextmanager
def only(checks: AbstractSet[str]) -> Iterator[None]:
    """Make some of the checks; the others are `not checked`."""
    attempt = model.attempt

    def some(name: str, make: Callable[[], Check]) -> Check:
        return attempt(name, make) if name in checks else Check(name, "not checked", "not of this trial")

    with replaced({"slope_compile.verify.model.attempt": some}):
        yield


def digest_of(path: Path) -> Outcome:
    """Return what the check `digest` alone says of a run's folder."""
    check = attempt("digest", lambda: check_digests(digests_of(RunFolder(path), STAGES)))
    failed = frozenset({"digest"} if check.status == "fail" else ())
    return Outcome(len(failed), failed, {"digest": check.detail}, "")


@contextlib.contextmanager
def copied(runs: Mapping[str, Path], name: str, folder: Path) -> Iterator[Subject]:
    """Give a copy of a run, an archive or an unpacked one; it is removed afterwards."""
    source, work = runs[name], folder / "copy"
    path = work / source.name
    if source.is_dir():
        shutil.copytree(source, path, symlinks=True)
    else:
        work.mkdir()
        shutil.copy(source, path)
    try:
        yield Subject(path, runs)
    finally:
        shutil.rmtree(work)


def verified(path: Path) -> Outcome:
    """Run `verify --json` and hold it to its promises: no traceback, one JSON object on stdout, a known exit code."""
    code, out, err = command("verify", str(path / LONE.get(path.name, "")), "--json")
    assert "Traceback" not in err, err
    assert code in (0, 1, 2), err
    told = json.loads(out)
    if "error" in told:
        return Outcome(code, frozenset(), {}, told["error"]["problem"])
    rows = {check["name"]: check for check in told["checks"]}
    failed = frozenset(name for name, check in rows.items() if check["status"] == "fail")
    assert (code, told["verdict"]) == ((1, "fail") if failed else (0, "pass"))
    return Outcome(code, failed, {name: check["detail"] for name, check in rows.items()}, "")


def tried(
    mutation: Mutation,
    runs: Mapping[str, Path],
    folder: Path,
    forged: bool,
    judge: Callable[[Path], Outcome] = verified,
) -> Outcome:
    """Return what is said of a mutation.

    Args:
        mutation: What is done.
        runs: The runs as they were made.
        folder: Where a copy is made.
        forged: With digests that were made to match.
        judge: Who says it: the command.
    """
    with copied(runs, mutation.subject, folder) as subject:
        mutation.corrupt(subject)
        if forged and mutation.forged and subject.file("manifest.json").exists():
            restamp(subject.path, mutation.header)
        return judge(subject.path)
