"""`slope-compile recipes`: the recipes inside the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from slope_compile.artifacts import write_atomically
from slope_compile.errors import RecipeError, nearest
from slope_compile.recipe import load_recipe, shipped_recipes
from slope_compile_cli import options
from slope_compile_cli.console import Console

app = typer.Typer(help="List, show or copy the shipped recipes.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A shipped recipe.")]


@app.command("ls")
def ls(json: options.Json = False) -> None:
    """List the shipped recipes with their first comment lines."""
    console = Console(json)
    recipes = {
        name: [ln[2:] for ln in text.splitlines() if ln.startswith("# ")] for name, text in shipped_recipes().items()
    }
    console.table("recipes", ["name", "what"], [(name, " — ".join(lines)) for name, lines in recipes.items()])
    console.result({"recipes": [{"name": name, "about": lines} for name, lines in recipes.items()]})


@app.command("show")
def show(
    name: Name, resolved: Annotated[bool, typer.Option("--resolved", help="Spell out every default.")] = False
) -> None:
    """Print a shipped recipe."""
    text = _text(name)
    sys.stdout.write(load_recipe(name).to_yaml() if resolved else text)


@app.command("cp")
def cp(name: Name, destination: Annotated[Path, typer.Argument(help="The file to write.")]) -> None:
    """Copy a shipped recipe to a file, as the start of your own."""
    text = _text(name)
    if destination.exists():
        raise RecipeError(f"{destination} exists.", "Choose another name, or remove it.")
    write_atomically(destination, text)


def _text(name: str) -> str:
    recipes = shipped_recipes()
    if name not in recipes:
        raise RecipeError(f"There is no shipped recipe '{name}'.", nearest(name, recipes))
    return recipes[name]
