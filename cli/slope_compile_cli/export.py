"""`slope-compile export`: the trained model as ONNX with Q/DQ and codes."""

from __future__ import annotations

from slope_compile_cli import options
from slope_compile_cli.console import Console


def command(
    run: options.RunArgument,
    settings: options.Set = None,
    json: options.Json = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> None:
    """Write model.onnx with the trained codes, and golden inputs and outputs beside it."""
    console = Console(json)
    recipe = options.recipe_of(run, settings or [])
    outcomes = options.execute(recipe, run, lambda _: ["export"], console, force=force, dry_run=dry_run)
    console.say(f"ONNX file: {run / 'export' / 'model.onnx'}")
    console.result({"run": str(run), "outcomes": options.outcomes_json(outcomes)})
