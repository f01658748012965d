"""What the commands print: results on stdout, everything else on stderr; progress bars only on a terminal."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from slope_compile.verify.ci.annotations import commandless
from slope_compile.verify.ci.write import on_github

LOG_WIDTH = 200
STYLES = {"pass": "green", "fail": "bold red", "not checked": "yellow"}


def json_requested(arguments: Sequence[str]) -> bool:
    """Say whether --json is among the arguments, for errors that come before they are parsed."""
    return "--json" in arguments


def safe(text: object) -> str:
    """Return text as it may be printed: one line, no markup, and nothing that steers a terminal or GitHub's runner."""
    spaced = str(text).translate({ord(blank): " " for blank in "\n\t"})
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)
    return escape(commandless(shown) if on_github(os.environ) else shown)


class Console:
    """The two streams of one command.

    Args:
        json: One JSON object goes to stdout and everything for people to stderr.
    """

    def __init__(self, json: bool = False) -> None:
        self.json = json
        self.err = _stream(stderr=True)
        self.out = self.err if json else _stream(stderr=False)

    def say(self, text: str) -> None:
        """Print one line for people."""
        self.out.print(safe(text))

    def result(self, data: Mapping[str, Any]) -> None:
        """Print the one JSON object, if asked for."""
        if self.json:
            # The same JSON; as it stands, GitHub's runner would take `##[` in a string for a command.
            sys.stdout.write(jsonlib.dumps(finite(data), indent=1).replace("##[", r"#\u0023[") + "\n")

    def failure(self, problem: str, remedy: str, code: int) -> None:
        """Print an error as one paragraph, and as JSON if asked for."""
        self.err.print(f"[bold red]error:[/] {safe(problem)} {safe(remedy)}".rstrip())
        self.result({"error": {"problem": problem, "remedy": remedy, "exit_code": code}})

    def trace(self, text: str) -> None:
        """Print what has several lines."""
        for line in text.splitlines():
            self.err.print(safe(line))

    def checks(self, verdict: Mapping[str, Any]) -> None:
        """Print the verdict table."""
        table = Table("check", "status", "detail", title=f"verdict: {verdict['verdict']}", title_justify="left")
        for check in verdict["checks"]:
            name = f"{check['name']} ({check['target']})" if "target" in check else check["name"]
            style = STYLES[check["status"]]
            table.add_row(safe(name), f"[{style}]{check['status']}[/]", safe(check["detail"]))
        self.out.print(table, soft_wrap=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; None becomes a dash."""
        table = Table(title=safe(title), title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, no_wrap=index == 0, overflow="fold")
        for row in rows:
            table.add_row(*(safe("–" if cell is None else str(cell)) for cell in row))
        self.out.print(table, soft_wrap=False)


def _stream(stderr: bool) -> rich.console.Console:
    # soft_wrap: a path or a sentence is never broken where no terminal asks for it; nor is a table in a log file.
    console = rich.console.Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LOG_WIDTH
    return console


def finite(value: Any) -> Any:
    """Return the value with NaN and infinities as null: JSON has neither."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


class StageProgress:
    """Draws what the stages tell: a bar per stage on a terminal, a line per stage elsewhere.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.err.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<14}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
            console=console.err, disable=not self._live,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Keep the bars on the terminal while the stages run."""
        with self._bars:
            yield

    def __call__(self, event: dict[str, Any]) -> None:
        """Draw one event."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler:
            handler(event)

    def _on_stage_start(self, event: dict[str, Any]) -> None:
        self._tasks[event["stage"]] = self._bars.add_task(event["stage"], total=None, text="")
        if not self._live:
            self._console.err.print(safe(f"{event['stage']}: started ({event['reason']})"))

    def _on_progress(self, event: dict[str, Any]) -> None:
        # A stage reports under its own short name: 'build' for 'build/a100'.
        task = next((t for name, t in reversed(self._tasks.items()) if name.startswith(event["stage"])), None)
        if task is not None:
            self._bars.update(task, completed=event["done"], total=event["total"], text=safe(event["text"]))

    def _on_stage_end(self, event: dict[str, Any]) -> None:
        task = self._tasks[event["stage"]]
        total = self._bars.tasks[task].total or 1
        self._bars.update(task, total=total, completed=total, text="done")
        if not self._live:
            self._console.err.print(safe(f"{event['stage']}: done in {event['wall_s']} s"))

    def _on_stage_skipped(self, event: dict[str, Any]) -> None:
        self._console.err.print(safe(f"{event['stage']}: skipped, {event['reason']}"))

    def _on_note(self, event: dict[str, Any]) -> None:
        self._console.err.print(safe(f"{event['stage']}: {event['text']}"))

    def _on_warning(self, event: dict[str, Any]) -> None:
        self._console.err.print(f"[yellow]warning:[/] {safe(event['stage'])}: {safe(event['text'])}")
