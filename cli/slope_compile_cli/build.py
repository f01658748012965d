"""`slope-compile build`: ONNX to a TensorRT engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.errors import RecipeError, SlopeCompileError
from slope_compile.events import Events
from slope_compile.recipe import BuildSection, build_section
from slope_compile.summary import build_of
from slope_compile_cli import bundle, options
from slope_compile_cli.bench import measure
from slope_compile_cli.console import Console, StageProgress
from slope_compile_cli.gate import Gate, Require

Source = Annotated[Path, typer.Argument(help="A run folder, a bundle, or an .onnx file.")]
EngineOut = Annotated[
    Path | None, typer.Option("--out", help="For an .onnx file: the engine file to write; for a bundle: its folder.")
]
Bench = Annotated[
    bool, typer.Option("--bench", help="Then measure each engine against the dense FP16 one, where its GPU is.")
]
COLUMNS = ("layer", "placement", "why", "engine", "sparse kernel", "kernel or note")


def command(
    source: Source,
    target: options.Target = None,
    out: EngineOut = None,
    require: Require = None,
    bench: Bench = False,
    settings: options.Set = None,
    json: options.Json = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> None:
    """Build an engine for each target, say what it really holds, and require it."""
    console = Console(json)
    if bundle.is_bundle(source):
        bundle.refuse(source, set=settings, dry_run=dry_run)
        _build_bundle(console, source, out, target, force, require or [], bench)
        return
    if source.suffix == ".onnx":
        if dry_run or force or len(target or []) > 1:
            raise RecipeError(
                f"{source} is an .onnx file: --dry-run, --force and several targets go with a run folder.",
                "Name one --target and, if you like, --out.",
            )
        section = build_section({} if target is None else {"targets": target}, settings or [], str(source))
        _build_file(console, source, section, out, Gate([*section.require, *(require or [])]), bench)
        return
    if out is not None:
        raise RecipeError(
            "--out goes with an .onnx file or a bundle: a run folder keeps its engines.", "Leave --out away."
        )
    recipe = options.recipe_of(source, settings or [])
    gate = Gate([*recipe.build.require, *(require or [])])
    stages = [f"build/{name}" for name in dict.fromkeys(target or recipe.build.targets)]
    outcomes = options.execute(recipe, source, lambda _: stages, console, force=force, dry_run=dry_run)
    built = {} if dry_run else {stage: build_of(RunFolder.existing(source), stage) for stage in stages}
    for stage, layers in built.items():
        print_layers(console, stage, layers)
        gate.judge(console, stage, layers)
    result = {"run": str(source), "outcomes": options.outcomes_json(outcomes), "builds": built}
    if bench:
        result["bench"] = {stage: _measured(console, source / stage / "model.engine") for stage in built}
    console.result({**result, "requirements": gate.to_json()})
    gate.close(console)


def _build_bundle(
    console: Console,
    source: Path,
    out: Path | None,
    targets: list[str] | None,
    force: bool,
    require: list[str],
    bench: bool,
) -> None:
    Gate(require)  # a misspelt requirement must not cost a build
    built = bundle.build(console, source, out, targets, force)
    gate = Gate([*built.require, *require])
    print_layers(console, str(built.engine), built.layers)
    gate.judge(console, str(built.engine), built.layers)
    outcome = {"action": built.action, "reason": built.reason}
    result = {"bundle": str(source), "engine": str(built.engine), **outcome, **built.layers}
    if bench:
        result["bench"] = _measured(console, built.engine)
    console.result({**result, "requirements": gate.to_json()})
    gate.close(console)


def _build_file(
    console: Console, source: Path, section: BuildSection, out: Path | None, gate: Gate, bench: bool
) -> None:
    from slope_compile.build.single import build, engine_path

    progress, target = StageProgress(console), section.targets[0]
    with progress.drawing():
        keys = section.model_dump(exclude={"targets"})
        result = build(source, target, out, events=Events(listeners=[progress]), **keys)
    title = f"{source} for {target}"
    print_layers(console, title, result)
    gate.judge(console, title, result)
    if bench:
        result = {**result, "bench": _measured(console, engine_path(source, target, out), source)}
    console.result({**result, "requirements": gate.to_json()})
    gate.close(console)


def _measured(console: Console, engine: Path, onnx: Path | None = None) -> dict[str, Any]:
    """Measure an engine that was built: where that fails, what the build has to say is still to come."""
    try:
        return measure(console, engine, onnx)
    except SlopeCompileError as error:
        console.say(f"{engine}: speed not checked: {error}")
        return {"status": "not checked", "reason": str(error)}


def print_layers(console: Console, title: str, layers: Mapping[str, Any]) -> None:
    """Print what became of every layer, and the counts."""
    if "line" not in layers["summary"]:
        console.say(f"{title}: written by another version of slope-compile, which counted less. Build it again.")
        return
    rows = [
        (row["name"], row["placement"], row["reason"], _held(row["engine"]), _sparse(row), _kernel(row["engine"]))
        for row in layers["layers"]
    ]
    console.table(title, COLUMNS, rows)
    summary = layers["summary"]
    console.say(_counted(summary))
    console.say(summary["line"])


def _counted(summary: Mapping[str, Any]) -> str:
    """`5 of 6 coded layers are held in the declared type; NOT held: fc.weight`."""
    from slope_compile.build.counts import NO_LIST

    if summary["held"] is None:
        return f"how many of {summary['coded']} coded layers are held in the declared type: not checked: {NO_LIST}"
    missing = f"; NOT held: {', '.join(summary['not_held'])}" if summary["not_held"] else ""
    return f"{summary['held']} of {summary['coded']} coded layers are held in the declared type{missing}"


def _held(engine: Mapping[str, Any]) -> str:
    """`Int4, 9216 bytes, fused`: what the engine has of a weight."""
    if engine["dtype"] is None:
        return "not found"
    size = [] if engine["bytes"] is None else [f"{engine['bytes']} bytes"]
    fused = {True: ["fused"], False: ["apart"]}.get(engine["fused"], [])
    return ", ".join([engine["dtype"], *size, *fused, *([] if engine["held"] else ["NOT as declared"])])


def _sparse(row: Mapping[str, Any]) -> str:
    """Whether the kernel is sparse; where nobody says, whether the weight fits 2:4."""
    chosen, eligible = row["engine"]["sparse_chosen"], row["engine"]["sparse_eligible"]
    if chosen is not None:
        return "chosen" if chosen else "eligible, not chosen" if eligible else "no"
    if eligible:
        return "eligible"
    return "fits 2:4, not checked" if row["fits_2_4"] else "no: does not fit 2:4"


def _kernel(engine: Mapping[str, Any]) -> str | None:
    parts = [part for part in (engine["note"], engine["tactic"]) if part]
    return "; ".join(parts) or None
