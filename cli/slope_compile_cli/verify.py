"""`slope-compile verify`: does every stage still say the same?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.summary import verdict_of
from slope_compile.targets.target import find_target
from slope_compile_cli import bundle, options
from slope_compile_cli.console import Console


def command(
    run: Annotated[Path, typer.Argument(help="A run folder, or a bundle.")],
    target: options.Target = None,
    settings: options.Set = None,
    json: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Check pattern, codes, parity between the stages and the task metric; exit 1 if a check fails."""
    console = Console(json)
    if bundle.is_bundle(run):
        bundle.refuse(run, set=settings, dry_run=dry_run)
        bundle.verify(console, run, target)
        return
    recipe = options.recipe_of(run, settings or [])
    targets = list(dict.fromkeys(target or recipe.build.targets))
    for name in target or []:  # asked for by name, an engine that was never built is no detail
        RunFolder.existing(run).require_record(f"build/{find_target(name).name}")
    # Always run: a check that was asked for is not answered from memory.
    outcomes = options.execute(
        recipe, run, lambda _: [f"verify/{t}" for t in targets], console, force=True, dry_run=dry_run
    )
    if dry_run:
        console.result({"run": str(run), "outcomes": options.outcomes_json(outcomes)})
        return
    verdict = verdict_of(RunFolder.existing(run), targets)
    console.checks(verdict)
    console.result(verdict)
    if verdict["verdict"] != "pass":
        raise typer.Exit(1)
