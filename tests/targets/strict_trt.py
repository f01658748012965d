"""A `tensorrt` module made from one of the fixtures: what the bindings of that version lack raises, calls are kept.

No GPU library is behind it. Methods take the arguments that pybind11 tells, by name or in order, and return `answers`.
"""

from __future__ import annotations

import enum
import json
import types
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def fixture(name: str) -> dict[str, Any]:
    """Return a fixture by the end of its name, such as `tensorrt-10.3.0`."""
    return dict(json.loads((DATA / f"bindings-{name}.json").read_text(encoding="utf-8")))


class StrictModule(types.ModuleType):
    """The module, and `calls`: (class.method, arguments) and (class.property =, value), in order."""

    def __init__(self, found: dict[str, Any], name: str = "tensorrt") -> None:
        super().__init__(name)
        self.__version__ = found["version"]
        self.calls: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        for title, members in found["enums"].items():
            setattr(self, title, enum.IntEnum(title, members, start=0))
        for title, attributes in found["classes"].items():
            setattr(self, title, self._class(title, attributes))
        self.Logger = type("Logger", (self.ILogger,), {"VERBOSE": 0, "Severity": None, "min_severity": 0})

    def _class(self, title: str, attributes: dict[str, Any]) -> type:
        module, calls, answers = self, self.calls, self.answers

        def read(instance: Any, name: str) -> Any:
            if name not in attributes:
                raise AttributeError(f"{module.__version__}: {title} has no {name}")
            if attributes[name] is None:
                return answers.get(f"{title}.{name}")

            def method(*given: Any, **named: Any) -> Any:
                arguments = _bind(f"{title}.{name}", attributes[name], given, named)
                calls.append((f"{title}.{name}", arguments))
                answer = answers.get(f"{title}.{name}")
                return answer(**arguments) if callable(answer) else answer

            return method

        def write(instance: Any, name: str, value: Any) -> None:
            if name not in attributes and title != "ILogger":  # a logger is subclassed in Python
                raise AttributeError(f"{module.__version__}: {title} has no {name}")
            object.__setattr__(instance, name, value)
            if title != "ILogger":
                calls.append((f"{title}.{name} =", value))

        def begin(instance: Any, *given: Any, **named: Any) -> None:
            if attributes["__init__"] is not None:
                _bind(title, attributes["__init__"], given, named)

        return type(title, (), {"__getattr__": read, "__setattr__": write, "__init__": begin})


def _bind(what: str, wanted: list[list[str]], given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return name -> value, or raise as pybind11 would."""
    for overload in wanted:
        names = [name.rstrip("=") for name in overload]
        arguments = dict(zip(names, given, strict=False)) | named
        required = {name for name in overload if not name.endswith("=")}
        if len(given) <= len(names) and set(named) <= set(names) and required <= set(arguments):
            return arguments
    raise TypeError(f"{what} takes {wanted}, and is called with {given} and {named}")
