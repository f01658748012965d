"""`--require sparse>=10`: what an engine must hold, judged after it was built; the engine stays, the gate fails.

A figure that is `not checked` satisfies nothing.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slope_compile.build.counts import NO_LIST, is_float, named, why_no_float
from slope_compile.errors import CheckFailedError, RecipeError, nearest
from slope_compile.placement.rules import INT8

Row = Mapping[str, Any]
OPERATORS: dict[str, Callable[[int, int], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_EXPRESSION = re.compile(r"\s*(?P<name>[\w-]+)\s*(?P<operator>[<>=!]+)\s*(?P<number>\d{1,9})\s*")


@dataclass(frozen=True)
class Figure:
    """A number that can be required.

    Args:
        title: What it counts.
        read: Gives the number, None where it is not checked, and why, from layers.json's `summary`.
        counts: Whether a row is counted.
        concerns: Whether a row that is not counted could have been.
    """

    title: str
    read: Callable[[Mapping[str, Any]], tuple[int | None, str]]
    counts: Callable[[Row], bool]
    concerns: Callable[[Row], bool]


def _is_fused_int4(row: Row) -> bool:
    return bool(row["engine"]["dtype"] == "Int4" and row["engine"]["fused"])


def _is_coded(row: Row) -> bool:
    return bool(row["placement"] != "float")


def _not_checked(text: str) -> str:
    return text.removeprefix("not checked: ")


FIGURES = {
    "sparse": Figure(
        "layers with a sparse kernel",
        lambda summary: (summary["sparse"]["chosen"], _not_checked(summary["sparse"]["chosen_by"])),
        lambda row: bool(row["engine"]["sparse_chosen"]),
        lambda row: bool(row.get("fits_2_4")),
    ),
    "eligible": Figure(
        "layers eligible for sparse kernels",
        lambda summary: (summary["sparse"]["eligible"], _not_checked(summary["sparse"]["eligible_by"])),
        lambda row: bool(row["engine"]["sparse_eligible"]),
        lambda row: bool(row.get("fits_2_4")),
    ),
    "int4": Figure(
        "layers with their INT4 weight fused into the product",
        lambda summary: (summary["int4"]["fused"], NO_LIST),
        _is_fused_int4,
        lambda row: row.get("bits") is not None and row["bits"] <= 4,
    ),
    "int8": Figure(
        "INT8 by INT8 products",
        lambda summary: (summary["int8"]["multiplied"], "the engine's layer list does not say all types"),
        lambda row: bool(row["engine"]["int8_product"]),
        lambda row: row["placement"] in INT8,
    ),
    "float": Figure(
        "layers left in float",
        lambda summary: (summary["float"], "" if summary["float"] is not None else why_no_float(summary)),
        is_float,
        _is_coded,
    ),
    "held": Figure(
        "coded layers held as declared",
        lambda summary: (summary["held"], NO_LIST),
        lambda row: _is_coded(row) and bool(row["engine"]["held"]),
        _is_coded,
    ),
}


@dataclass(frozen=True)
class Requirement:
    """One requirement, such as `sparse>=10`."""

    name: str
    operator: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.number}"


@dataclass(frozen=True)
class Judged:
    """What became of a requirement.

    Args:
        requirement: What was required.
        figure: What the engine has, None where it is not checked.
        met: Whether it suffices.
        detail: The figure in words, and the layers that miss.
    """

    requirement: Requirement
    figure: int | None
    met: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        figure = "not checked" if self.figure is None else self.figure
        return {"expression": str(self.requirement), "figure": figure, "met": self.met, "detail": self.detail}


def parse_requirements(expressions: Iterable[str]) -> list[Requirement]:
    """Return the requirements, in order, each once.

    Args:
        expressions: `NAME OPERATOR NUMBER`, such as `sparse>=10`.

    Raises:
        RecipeError: If one is not of that form, or names no figure.
    """
    found = []
    for text in expressions:
        match = _EXPRESSION.fullmatch(text)
        if match is None or match["operator"] not in OPERATORS:
            raise RecipeError(
                f"The requirement '{text}' is not of the form NAME OPERATOR NUMBER.",
                f"Example: sparse>=10. Operators: {' '.join(OPERATORS)}. Names: {', '.join(FIGURES)}.",
            )
        if match["name"] not in FIGURES:
            raise RecipeError(
                f"The requirement '{text}' names no figure of an engine.", nearest(match["name"], FIGURES)
            )
        found.append(Requirement(match["name"], match["operator"], int(match["number"])))
    return list(dict.fromkeys(found))


def judge(requirements: Iterable[Requirement], built: Mapping[str, Any]) -> list[Judged]:
    """Hold requirements against an engine.

    Args:
        requirements: What it must hold.
        built: Its layers.json: `summary` and `layers`.
    """
    return [_judge(requirement, built) for requirement in requirements]


def require_met(judged: Iterable[Judged], engine: str) -> None:
    """Raise unless every requirement is met.

    Args:
        judged: As `judge` returned them.
        engine: What a person calls the engine.

    Raises:
        CheckFailedError: Naming the figures and the layers that miss.
    """
    missed = [one for one in judged if not one.met]
    if missed:
        raise CheckFailedError(f"{engine} is built and does not hold what is required: {tell(missed)}")


def tell(judged: Iterable[Judged]) -> str:
    """Return the requirements and their details as sentences."""
    return " ".join(f"{one.requirement}: {one.detail}" for one in judged)


def _judge(requirement: Requirement, built: Mapping[str, Any]) -> Judged:
    figure = FIGURES[requirement.name]
    count, reason = figure.read(built["summary"])
    if count is None:
        return Judged(requirement, None, False, f"{figure.title} are not checked: {reason}.")
    met = OPERATORS[requirement.operator](count, requirement.number)
    said = f"{count} {figure.title}"
    if met:
        return Judged(requirement, count, True, f"{said}.")
    too_many = count > requirement.number or (count == requirement.number and requirement.operator == "<")
    rows = [row for row in built["layers"] if _is_to_blame(figure, row, too_many)]
    blamed = f"; {'counted' if too_many else 'not among them'}: {named([row['name'] for row in rows])}" if rows else ""
    return Judged(requirement, count, False, f"{said}{blamed}.")


def _is_to_blame(figure: Figure, row: Row, too_many: bool) -> bool:
    return figure.counts(row) if too_many else figure.concerns(row) and not figure.counts(row)
