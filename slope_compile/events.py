"""What a stage tells while it works: one JSON object an event, to a file and to whoever listens.

The library prints nothing. The command line listens and draws progress bars; `events.jsonl` keeps the record.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Listener = Callable[[dict[str, Any]], None]


class Events:
    """Hands each event to the listeners and appends it to a JSON-lines file.

    Args:
        path: The file to append to, or None to keep no record.
        listeners: Called with every event, in order.
    """

    def __init__(self, path: Path | None = None, listeners: Sequence[Listener] = ()) -> None:
        self._path = path
        self._listeners = tuple(listeners)

    def emit(self, kind: str, **fields: Any) -> None:
        """Send one event; `time` (Unix seconds) and `kind` are added. Progress is shown, not recorded."""
        event = {"time": round(time.time(), 3), "kind": kind, **fields}
        for listener in self._listeners:
            listener(event)
        if self._path is not None and kind != "progress":
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, allow_nan=True) + "\n")

    def progress(self, stage: str, done: float, total: float, text: str = "") -> None:
        """Say that `done` of `total` units of `stage` are behind us; `text` is the bar's short caption."""
        self.emit("progress", stage=stage, done=done, total=total, text=text)

    def note(self, stage: str, text: str) -> None:
        """Say something a person should read once."""
        self.emit("note", stage=stage, text=text)

    def warning(self, stage: str, text: str) -> None:
        """Say something a person should act on, though the stage goes on."""
        self.emit("warning", stage=stage, text=text)

    def metric(self, stage: str, **values: Any) -> None:
        """Record measured values (per epoch, per layer)."""
        self.emit("metric", stage=stage, **values)
