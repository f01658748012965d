"""What a verification says: checks, each with a status, and one verdict over them.

`not checked` is never a pass and never a failure: it says that this machine, or what was given, did not allow the
check, and why. The verdict is `fail` if some check failed, if one that was required did not pass, or if none passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from slope_compile.errors import SlopeCompileError
from slope_compile.verify.require import judge_required

Status = Literal["pass", "fail", "not checked"]
LONGEST_REASON = 300  # characters
T = TypeVar("T")


class NotCheckedError(Exception):
    """Raised inside a check that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """One check of a verification.

    Args:
        name: One of `slope_compile.verify.require.CHECKS`.
        status: What came of it.
        detail: One line for a person: what was found, or why it could not be checked.
        figures: What was measured, ready for JSON; no times.
    """

    name: str
    status: Status
    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return verify.json's form; a number that JSON cannot hold (NaN, infinity) becomes its name."""
        return {"name": self.name, "status": self.status, "detail": self.detail, "figures": _jsonable(self.figures)}


@dataclass(frozen=True)
class Verdict:
    """All checks of a verification, in the order in which they ran.

    Args:
        checks: What was found.
        required: Names of checks that must pass.
        integrity: Names of checks that prove a file to be whole, and nothing of the model in it: they may fail the
            verification, and do not carry it.
    """

    checks: tuple[Check, ...]
    required: tuple[str, ...] = ()
    integrity: frozenset[str] = frozenset()

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """`fail` if some check failed or a required one did not pass, or if none of the model could be made."""
        states = {check.status for check in self.checks if check.status == "fail" or check.name not in self.integrity}
        met = all(row["met"] for row in self.requirements())
        return "pass" if "pass" in states and "fail" not in states and met else "fail"

    def requirements(self) -> list[dict[str, Any]]:
        """Return what became of each required check."""
        return judge_required(self.required, [check.to_json() for check in self.checks])

    def __getitem__(self, name: str) -> Check:
        """Return the check of that name."""
        return next(check for check in self.checks if check.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return `{"verdict": ..., "checks": [...], "required": [...]}`."""
        checks = [check.to_json() for check in self.checks]
        return {"verdict": self.verdict, "checks": checks, "required": self.requirements()}


class Once(Generic[T]):
    """A value loaded when first asked for; a load that failed raises the same error to everybody who asks.

    Several checks look at the same file: each must say what is wrong with it, and none may hide it from the others.
    """

    def __init__(self, load: Callable[[], T]) -> None:
        self._load = load
        self._value: list[T] = []
        self._error: Exception | None = None

    def __call__(self) -> T:
        """Return the value.

        Raises:
            Exception: What loading it raised.
        """
        if self._error is not None:
            raise self._error
        if not self._value:
            try:
                self._value.append(self._load())
            except Exception as error:
                self._error = error
                raise
        return self._value[0]


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Run one check; whatever it raises becomes its status, in one line.

    A damaged artifact may raise anything anywhere in onnx, ONNX Runtime, safetensors or torch. All of it means the
    same: the artifact is not what it should be, and the remaining checks still have to look at it.
    """
    try:
        return check()
    except NotCheckedError as error:
        return Check(name, "not checked", str(error))
    except NameError:  # no file raises that: it is a bug of ours
        raise
    except Exception as error:
        return Check(name, "fail", reason(error))


def reason(error: Exception) -> str:
    """Return one line that says what an exception means."""
    text = error.problem if isinstance(error, SlopeCompileError) else f"{type(error).__name__}: {error}"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def listed(problems: Iterable[str], most: int = 8) -> str:
    """Join problems into one line, the first `most` of them spelt out and the rest counted."""
    found = list(problems)
    rest = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + rest


def significant(value: float, digits: int = 3) -> float:
    """Round to significant digits: what is below them is the noise of one machine's thread count."""
    return float(f"{value:.{digits}g}")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
