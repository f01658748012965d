"""Lets a room of the package be called like the function it is named after.

`sc.build("m.onnx", …)` is the public function and `slope_compile.build` the folder it lives in. Python binds a folder's
name on its parent as soon as anything below it is imported, which would hide a function of the same name.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    __entry__: tuple[str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        home, function = self.__entry__
        return getattr(importlib.import_module(home), function)(*args, **kwargs)


def make_callable(room: str, home: str, function: str) -> None:
    """Make calling the module `room` call `function` of the module `home`, imported on first use."""
    module = sys.modules[room]
    module.__class__ = _CallableRoom
    module.__entry__ = (home, function)  # type: ignore[attr-defined]
