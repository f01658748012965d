"""`slope-compile inspect`: what an artifact holds, and with `--target` what a target makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.errors import ArtifactError, RecipeError
from slope_compile.recipe import BuildSection, load_recipe
from slope_compile.summary import build_of, summarize
from slope_compile_cli import bundle, options, pack
from slope_compile_cli.build import print_layers
from slope_compile_cli.console import Console
from slope_compile_cli.run import print_summary

if TYPE_CHECKING:
    from slope_compile.lint.rules import Violation
    from slope_compile.placement.choose import Place
    from slope_compile.qdq.weights import CodedWeight

LAYER_COLUMNS = ("name", "bits", "activation_bits", "pattern", "density", "cosine", "sqnr_db", "placement", "reason")
PLACE_COLUMNS = ("name", "op", "stored", "placement", "container", "estimated µs", "reason")
VIOLATION_COLUMNS = ("rule", "level", "where", "detail", "source")
MOST_SHOWN = 8  # of one rule; --json has all
DEFAULT_BACKEND = "tensorrt"

Target = Annotated[str | None, typer.Option("--target", "-t", help="Plan an .onnx file or a run for it, and lint it.")]
Backend = Annotated[
    str | None, typer.Option("--backend", help="With --target: who builds. Default: the run's recipe, else tensorrt.")
]


def command(
    artifact: Annotated[
        Path, typer.Argument(help="A run folder, a bundle, an .onnx, a .slope or a codes.safetensors file.")
    ],
    target: Target = None,
    backend: Backend = None,
    json: options.Json = False,
) -> None:
    """Print stages, layers and sizes of a run, or the weights of a file; with --target, placements and violations."""
    console = Console(json)
    if backend is not None and target is None:
        raise RecipeError(f"--backend {backend} without --target plans nothing.", "Name the --target too.")
    if bundle.is_bundle(artifact):
        bundle.refuse(artifact, target=target)
        bundle.inspect(console, artifact)
    elif artifact.is_dir():
        _run(console, artifact, target, backend)
    elif artifact.suffix == ".onnx":
        _onnx(console, artifact, target, backend)
    elif artifact.suffix == ".safetensors" or pack.is_packed(artifact):
        if target is not None:
            raise RecipeError(
                f"{artifact} is no graph: --target goes with an .onnx file or a run.", "Name one of these."
            )
        if artifact.suffix == ".safetensors":
            _weights(console, artifact, _codes_rows(artifact))
        else:
            pack.inspect(console, artifact)
    else:
        what = (
            "is neither a run folder, a bundle, an .onnx, a .slope nor a .safetensors file"
            if artifact.exists()
            else "does not exist"
        )
        raise ArtifactError(f"{artifact} {what}.", "Name one of these.")


def _run(console: Console, path: Path, target: str | None, backend: str | None) -> None:
    folder = RunFolder.existing(path)
    summary = summarize(folder)
    stages = [
        (stage, len(r.outputs), r.facts.get("wall_s"), "; ".join(map(str, folder.mismatches(stage))) or "ok")
        for stage, r in folder.records.items()
    ]
    console.table("stages", ["stage", "files", "seconds", "state"], stages)
    rows = summary["layers"]
    # Only what was asked for has a column.
    columns = [c for c in LAYER_COLUMNS if c != "activation_bits" or any(row.get(c) is not None for row in rows)]
    console.table("layers", columns, [[_short(row.get(c)) for c in columns] for row in rows])
    for name in summary["engines"]:
        print_layers(console, f"engine for {name}", build_of(folder, f"build/{name}"))
    print_summary(console, summary)
    if target is None:
        console.result(summary)
        return
    section = load_recipe(path / "recipe.yaml").build
    asked = DEFAULT_BACKEND if section.backend == "auto" else section.backend
    folder.require_record("export")
    judged = _judge(console, path / "export" / "model.onnx", section, target, backend or asked)
    _finish(console, {**summary, **judged})


def _onnx(console: Console, path: Path, target: str | None, backend: str | None) -> None:
    if target is None:
        _weights(console, path, _onnx_rows(_coded(path)))
        return
    judged = _judge(console, path, BuildSection(), target, backend or DEFAULT_BACKEND)
    _finish(console, {"file": str(path), "bytes": path.stat().st_size, **judged})


def _judge(console: Console, path: Path, section: BuildSection, target: str, backend: str) -> dict[str, Any]:
    """Print what a target makes of a model, and return it as JSON."""
    from slope_compile.lint.assumed import assumed_situation
    from slope_compile.lint.check import lint
    from slope_compile.placement.choose import choose_places

    situation = assumed_situation(path, section, target, backend)
    violations = lint(path, situation)
    weights: list[CodedWeight] = []
    places: list[Place] = []
    try:
        weights = _coded(path)
        places = choose_places(path, weights, situation)
    except ArtifactError as error:
        if not any(violation.level == "error" for violation in violations):
            raise
        console.say(f"no placement: {error.problem}")
    activations = f"activations that are not quantized are {situation.precision} ({situation.precision_reason})"
    console.say(f"{situation.backend.title} {situation.version} for {situation.target}: {activations}")
    console.table(
        "planned placement", PLACE_COLUMNS, [_place_cells(w, p) for w, p in zip(weights, places, strict=False)]
    )
    _print_violations(console, violations)
    return {
        "target": situation.target.name,
        "backend": {"name": situation.backend.name, "version": situation.version},
        "precision": {"name": situation.precision, "reason": situation.precision_reason},
        "weights": _onnx_rows(weights),
        "placement": [_place_json(w, p) for w, p in zip(weights, places, strict=False)],
        "violations": [asdict(violation) for violation in violations],
    }


def _finish(console: Console, result: dict[str, Any]) -> None:
    """Print the result; exit 1 if the target would not build the file as it is meant."""
    console.result(result)
    if any(violation["level"] == "error" for violation in result["violations"]):
        raise typer.Exit(1)


def _place_cells(weight: CodedWeight, place: Place) -> Sequence[object]:
    costs = ", ".join(
        f"{name} {seconds * 1e6:.3g}" for name, seconds in sorted(place.costs.items(), key=lambda c: c[1])
    )
    return weight.name, weight.op, weight.dtype, place.placement, place.container, costs or None, place.reason


def _place_json(weight: CodedWeight, place: Place) -> dict[str, Any]:
    return {"name": weight.name, "op": weight.op, "node": weight.node, "stored": weight.dtype, **asdict(place)}


def _print_violations(console: Console, violations: Sequence[Violation]) -> None:
    if not violations:
        console.say("no rule is broken")
        return
    by_rule: dict[str, list[Violation]] = {}
    for violation in violations:
        by_rule.setdefault(violation.rule, []).append(violation)
    rows: list[Sequence[object]] = []
    for rule, found in by_rule.items():
        rows += [(rule, v.level, v.where, v.detail, v.source) for v in found[:MOST_SHOWN]]
        if len(found) > MOST_SHOWN:
            rows.append((rule, "", f"… and {len(found) - MOST_SHOWN} more", "--json lists them all", ""))
    console.table("violations", VIOLATION_COLUMNS, rows)
    for rule, found in by_rule.items():
        for remedy in dict.fromkeys(violation.remedy for violation in found):
            console.say(f"{rule}: {remedy}")
    errors = sum(violation.level == "error" for violation in violations)
    console.say(f"{errors} errors, {len(violations) - errors} warnings")


def _coded(path: Path) -> list[CodedWeight]:
    from slope_compile.qdq.reader import coded_weights

    return coded_weights(path)


def _onnx_rows(weights: Sequence[CodedWeight]) -> list[dict[str, Any]]:
    import numpy as np

    from slope_compile.qdq.pattern import is_sparse

    return [
        {
            "name": weight.name,
            "op": weight.op,
            "dtype": weight.dtype,
            "shape": list(weight.stored.shape),
            "density": int(np.count_nonzero(weight.stored)) / max(1, weight.stored.size),
            "fits_2_4": is_sparse(weight),
        }
        for weight in weights
    ]


def _codes_rows(path: Path) -> list[dict[str, Any]]:
    from slope_compile.codes_file import load_codes

    return [
        {"name": name, "bits": c.bits, "pattern": c.pattern, "shape": list(c.codes.shape), "density": c.density}
        for name, c in load_codes(path).items()
    ]


def _weights(console: Console, path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0]) if rows else ["name"]
    console.table(str(path), columns, [[_short(value) for value in row.values()] for row in rows])
    console.result({"file": str(path), "bytes": path.stat().st_size, "weights": rows})


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
