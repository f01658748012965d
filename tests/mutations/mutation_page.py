"""docs/mutations.md, from the mutations as they are declared: `python tests/mutations/mutation_page.py` writes it.

What the page says is what the suite proves: each row's checks are those that must fail for the suite to pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mutation import ARTIFACTS, Mutation, Variant
from mutation_list import MUTATIONS, VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "mutations.md"
HEAD = """# Mutations: the verifier under test

A verifier that never fails proves nothing. `tests/mutations/` corrupts the artifacts of a small real run, one thing at
a time, and requires of `slope-compile verify RUN --json` the right failing check, the right exit code, one JSON object
on stdout and no traceback. It also writes correct artifacts in other ways, which must all pass.

The run is a residual network (convolutions with batch norms and biases, a product with a square matrix, layer norm, a
last layer) in 4 bits, 2:4, with a scale for each channel, trained, packed, exported, built with TensorRT-RTX and
bundled by the commands themselves. A second run quantizes activations too, and a third has another seed: *another run*
below.

Each mutation of a file that a manifest lists is tried twice:

- **as it is**: `digest` must fail, whatever else does, and the exit code is 1;
- **forged**: the manifest is rewritten to match, and where it concerns another file than the engine's, so are the
  digests in the engine's `layers.json`. Then only the checks that understand the file can catch it. The last column
  names those that must fail. Of the checks that look at bytes (`digest`, `pattern`, `codes`, `packed`, `placement`) no
  other one may; those that compare a file with another (`parity.*`, `engine.layers`, `metric`, …) may fail together.

One row of each artifact is tried with all that follows a judgement (the first layer that differs, reproducers, the
report), one in ten with all checks, and so is every one that is missed; the others with the checks that look at bytes
and those that must fail. As it is, the first of each artifact is tried by the command, the others by `digest` itself.

Where the column says *refused*, the command ends with exit code 2 and says why, as it does for any input that cannot be
read at all. A manifest, a recipe and an archive are tried once: they are what the digests are in.

A row that says **missed** is published as it is: nothing but the digest catches that mutation, and the reason is given.
The engine does not run on the machine that tests this, so what only running it would show is not claimed here. What
is: its bytes are searched for the placed codes and scales, which TensorRT-RTX 1.7 keeps as they were given, so another
model's engine is told though everything that is written of it was forged.

A file that lies without its run (*alone*) is judged by what lies beside it: golden samples and a layer list beside a
model, nothing beside a packed file. What obeys the laws and differs from nothing there is missed, and says so.
"""


def render(mutations: Iterable[Mutation] = tuple(MUTATIONS), variants: Iterable[Variant] = tuple(VARIANTS)) -> str:
    """Return the page's text."""
    rows, correct = list(mutations), list(variants)
    parts = [HEAD, *_totals(rows, correct)]
    for artifact, what in ARTIFACTS.items():
        mine = [row for row in rows if row.artifact == artifact]
        parts += [f"\n## {artifact}\n", f"{what[0].upper()}{what[1:]}.\n", _row("mutation", "tried", "caught", "by")]
        parts += ["|---|--:|--:|---|", *(_row(one.kind, str(_tried(one)), str(_caught(one)), _by(one)) for one in mine)]
    parts += ["\n## Correct variants\n", "Other ways to write the same; all must pass.\n", _row("artifact", "variant")]
    parts += ["|---|---|", *(_row(one.artifact, one.kind) for one in correct)]
    return "\n".join(parts) + "\n"


def _totals(rows: list[Mutation], correct: list[Variant]) -> list[str]:
    lines = ["## Totals\n", _row("artifact", "kinds", "tried", "caught", "missed"), "|---|--:|--:|--:|--:|"]
    for artifact in (*ARTIFACTS, ""):
        mine = [row for row in rows if artifact in ("", row.artifact)]
        tried, caught = sum(map(_tried, mine)), sum(map(_caught, mine))
        numbers = [str(n) for n in (len(mine), tried, caught, tried - caught)]
        lines.append(_row(artifact or "**all**", *numbers))
    distinct = len({row.kind for row in rows})
    lines.append(f"\n{distinct} different kinds; {len(rows)} mutations. Correct variants: {len(correct)}, all passed.")
    return lines


def _tried(mutation: Mutation) -> int:
    return 1 + mutation.naive


def _caught(mutation: Mutation) -> int:
    return _tried(mutation) - bool(mutation.missed)


def _by(mutation: Mutation) -> str:
    if mutation.missed:
        return f"**missed**: {mutation.missed}"
    if mutation.code == 2:
        return "refused"
    return ", ".join(f"`{check}`" for check in sorted(mutation.by))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
