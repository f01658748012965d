"""The options that several commands share, and how they become a pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.errors import ArtifactError, RecipeError
from slope_compile.events import Events
from slope_compile.pipeline import TRAIN_SECTIONS, Outcome, Pipeline, is_first_process, open_run
from slope_compile.recipe import Recipe, load_recipe
from slope_compile.verify.asked import Asked
from slope_compile_cli.console import Console, StageProgress
from slope_compile_cli.interrupt import raise_again

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe (`recipes ls`).")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, as `train` or `run` wrote it.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="The run folder. Default: runs/NAME, plus what --set changes of the training."),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: section.key=value. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything for people on stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say which stages would run, and why; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Redo the stages even if nothing has changed.")]
Target = Annotated[
    list[str] | None, typer.Option("--target", "-t", help="Target device. Repeatable. Default: the recipe's.")
]


def default_out(recipe: str, sets: Iterable[str]) -> Path:
    """Return runs/NAME; settings that change the training get a folder of their own."""
    changed = sorted(s for s in sets if s.partition(".")[0].strip() in TRAIN_SECTIONS)
    name = "+".join([Path(recipe).stem, *(s.partition(".")[2] for s in changed)])
    return Path("runs") / re.sub(r"[^A-Za-z0-9._+=-]+", "-", name)


def recipe_of(run: Path, sets: Iterable[str]) -> Recipe:
    """Return the recipe of an existing run folder with settings applied.

    Raises:
        ArtifactError: If the folder is no run folder.
        RecipeError: If a setting would change what was trained.
    """
    from slope_compile.bundle.opened import STAGE

    if STAGE in RunFolder.existing(run).records:
        raise ArtifactError(
            f"{run} is where a bundle was unpacked, not a run folder.", "`build`, `verify` and `inspect` take it."
        )
    for setting in sets:
        if setting.partition(".")[0].strip() in TRAIN_SECTIONS:
            raise RecipeError(
                f"--set {setting}: {run} is trained already.", "Train with it: `slope-compile train RECIPE --set …`."
            )
    return load_recipe(run / "recipe.yaml", sets)


def execute(
    recipe: Recipe,
    out: Path,
    choose: Callable[[Pipeline], list[str]],
    console: Console,
    *,
    force: bool,
    dry_run: bool,
    asked: Asked | None = None,
) -> list[Outcome]:
    """Run the stages that `choose` names, drawing their progress; or say what would run."""
    if dry_run:
        pipeline = Pipeline(recipe, RunFolder(out), Events(), force, asked)
        outcomes = pipeline.plan(choose(pipeline))
        for outcome in outcomes:
            console.say(f"{outcome.stage}: {outcome.action} ({outcome.reason})")
        return outcomes
    if not is_first_process():
        with open_run(out, recipe, Events(), force) as pipeline:
            pipeline.run(choose(pipeline))
        raise typer.Exit  # the first process tells
    progress = StageProgress(console)
    with progress.drawing():
        events = Events(out / "events.jsonl", [progress, raise_again])
        with open_run(out, recipe, events, force, asked) as pipeline:
            return pipeline.run(choose(pipeline))


def outcomes_json(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return outcomes as JSON rows."""
    return [{"stage": o.stage, "action": o.action, "reason": o.reason} for o in outcomes]
