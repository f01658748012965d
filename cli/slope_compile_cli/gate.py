"""`--require`, for every command that builds: what is required is told beside what the engine holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slope_compile_cli.console import Console

if TYPE_CHECKING:
    from slope_compile.build.gate import Judged, Requirement

Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        help="What the engine must hold, such as 'sparse>=10' or 'int4>=5'; exit 1 if it does not. Repeatable.",
    ),
]


class Gate:
    """Requirements, read before anything is built, and what became of them.

    Args:
        expressions: The recipe's and the command line's.

    Raises:
        RecipeError: If one is no requirement.
    """

    def __init__(self, expressions: Iterable[str]) -> None:
        from slope_compile.build.gate import parse_requirements

        self._requirements: Sequence[Requirement] = parse_requirements(expressions)
        self._judged: dict[str, list[Judged]] = {}

    def judge(self, console: Console, engine: str, built: Mapping[str, Any]) -> None:
        """Hold an engine's layers.json against the requirements, and print what became of each."""
        from slope_compile.build.gate import judge

        self._judged[engine] = judge(self._requirements, built)
        for one in self._judged[engine]:
            console.say(f"require {one.requirement}: {'met' if one.met else 'NOT met'}, {one.detail}")

    def to_json(self) -> list[dict[str, Any]]:
        """Return what `--json` prints of them."""
        return [{"engine": engine, **one.to_json()} for engine, judged in self._judged.items() for one in judged]

    def close(self, console: Console) -> None:
        """Raise if a requirement is not met: the last thing that a command does, for the engines stay.

        Raises:
            CheckFailedError: Naming the figures and the layers that miss; with --json, which has them, exit 1.
        """
        from slope_compile.build.gate import require_met

        if console.json and not all(one.met for judged in self._judged.values() for one in judged):
            raise typer.Exit(1)
        for engine, judged in self._judged.items():
            require_met(judged, engine)
