"""`slope-compile build`: ONNX to a TensorRT engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.errors import RecipeError
from slope_compile.events import Events
from slope_compile.recipe import BuildSection
from slope_compile.summary import build_of
from slope_compile_cli import options
from slope_compile_cli.console import Console, StageProgress

Source = Annotated[Path, typer.Argument(help="A run folder, or an .onnx file.")]
EngineOut = Annotated[Path | None, typer.Option("--out", help="For an .onnx file: the engine file to write.")]
COLUMNS = ("name", "placement", "bytes", "engine type", "held", "tactic or note")


def command(
    source: Source,
    target: options.Target = None,
    out: EngineOut = None,
    settings: options.Set = None,
    json: options.Json = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> None:
    """Build an engine for each target, and say what it really holds."""
    console = Console(json)
    if source.suffix == ".onnx":
        if settings or dry_run or force or len(target or []) > 1:
            raise RecipeError(
                f"{source} is an .onnx file: --set, --dry-run, --force and several targets go with a run folder.",
                "Name one --target and, if you like, --out.",
            )
        _build_file(console, source, (target or BuildSection().targets)[0], out)
        return
    if out is not None:
        raise RecipeError("--out goes with an .onnx file: a run folder keeps its engines.", "Leave --out away.")
    recipe = options.recipe_of(source, settings or [])
    stages = [f"build/{name}" for name in dict.fromkeys(target or recipe.build.targets)]
    outcomes = options.execute(recipe, source, lambda _: stages, console, force=force, dry_run=dry_run)
    built = {} if dry_run else {stage: build_of(RunFolder.existing(source), stage) for stage in stages}
    for stage, layers in built.items():
        _print_layers(console, stage, layers)
    console.result({"run": str(source), "outcomes": options.outcomes_json(outcomes), "builds": built})


def _build_file(console: Console, source: Path, target: str, out: Path | None) -> None:
    from slope_compile.build.single import build

    progress = StageProgress(console)
    with progress.drawing():
        layers = build(source, target, out, events=Events(listeners=[progress]))
    _print_layers(console, f"{source} for {target}", layers)
    console.result(layers)


def _print_layers(console: Console, title: str, layers: Mapping[str, Any]) -> None:
    rows = []
    for row in layers["layers"]:
        engine = row["engine"]
        rows.append(
            (row["name"], row["placement"], engine["bytes"], engine["dtype"], "yes" if engine["held"] else "NO",
             engine["note"] or engine["tactic"])
        )  # fmt: skip
    console.table(title, COLUMNS, rows)
    summary = layers["summary"]
    sparse = summary["sparse"]
    console.say(f"{summary['held']} of {summary['coded']} coded layers are held in the declared type")
    console.say(f"sparse kernels: eligible {sparse['eligible']}, chosen {sparse['chosen']} ({sparse['source']})")
