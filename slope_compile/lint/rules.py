"""What a lint rule is, and the registry that the rule modules fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from slope_compile.lint.view import View

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Violation:
    """One place where a file breaks a rule.

    Attributes:
        rule: The rule's id.
        level: `error`: the build fails, computes something else than the file says, or the file is no valid ONNX, so
            that nothing can verify it; `warning`: slower than it need be, not sparse, or mended by `build` itself.
        where: The node or tensor.
        detail: The offending value.
        remedy: What to do.
        source: Where the rule is written or was observed.
    """

    rule: str
    level: Level
    where: str
    detail: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Hit:
    """What a rule's function yields.

    Attributes:
        where: The node or tensor.
        detail: The offending value.
        mended: Whether `slope-compile build` moves this weight to a form that the backend takes: then only a warning.
    """

    where: str
    detail: str
    mended: bool = False


Check = Callable[[View], Iterator[Hit]]


@dataclass(frozen=True)
class Rule:
    """One rule: its id, how bad a breach is, what it says, who says so, what to do, and the function that looks."""

    id: str
    level: Level
    title: str
    source: str
    remedy: str
    check: Check

    def violation(self, hit: Hit) -> Violation:
        """Return a hit of this rule as it is reported."""
        if hit.mended:
            remedy = "`slope-compile build` moves it to a type and form that the backend takes; other builders do not."
            return Violation(self.id, "warning", hit.where, hit.detail, remedy, self.source)
        return Violation(self.id, self.level, hit.where, hit.detail, self.remedy, self.source)


RULES: dict[str, Rule] = {}


def rule(id: str, level: Level, title: str, source: str, remedy: str) -> Callable[[Check], Check]:
    """Register a function as a rule.

    Args:
        id: Its name, unique.
        level: Of a breach that `build` does not mend.
        title: The rule, one sentence.
        source: Where it is written or was observed.
        remedy: What to do about a breach, one sentence.
    """

    def register(check: Check) -> Check:
        if id in RULES:
            raise ValueError(f"there are two rules '{id}'")
        RULES[id] = Rule(id, level, title, source, remedy, check)
        return check

    return register
