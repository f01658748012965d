"""Ctrl-C, also where a library swallows it: some catch every exception while they import or probe something."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

_pressed = False


def watch() -> None:
    """Remember a Ctrl-C besides raising KeyboardInterrupt."""
    signal.signal(signal.SIGINT, _press)


def raise_again(_: dict[str, Any]) -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and the program went on; a listener of `Events`."""
    if _pressed:
        raise KeyboardInterrupt


def _press(_: int, __: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
