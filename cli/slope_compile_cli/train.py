"""`slope-compile train`: FP32, then compressed fine-tuning."""

from __future__ import annotations

from slope_compile.recipe import load_recipe
from slope_compile_cli import options
from slope_compile_cli.console import Console


def command(
    recipe: options.RecipeArgument,
    out: options.Out = None,
    settings: options.Set = None,
    json: options.Json = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> None:
    """Train a model with sparse, low-bit weights; writes the checkpoint and its codes."""
    console, sets = Console(json), settings or []
    resolved = load_recipe(recipe, sets)
    folder = out or options.default_out(recipe, sets)
    outcomes = options.execute(resolved, folder, lambda p: p.stages("train"), console, force=force, dry_run=dry_run)
    console.say(f"run folder: {folder}")
    console.result({"run": str(folder), "outcomes": options.outcomes_json(outcomes)})
