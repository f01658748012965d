"""`slope-compile verify`: does every stage still say the same? Of a run, a bundle, a lone ONNX or packed file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.errors import RecipeError
from slope_compile.events import Events
from slope_compile.recipe import Recipe
from slope_compile.summary import verdict_of
from slope_compile.targets.target import find_target
from slope_compile.verify.asked import Asked
from slope_compile_cli import bundle, options, pack
from slope_compile_cli.console import Console, StageProgress
from slope_compile_cli.explained import tell_verdict
from slope_compile_cli.reports import Reports

Kind = Literal["run", "bundle", "onnx", "packed"]
WORDS = {"run": "a run folder", "bundle": "a bundle", "onnx": "an .onnx file", "packed": "a packed file"}
LONE = ("onnx", "packed")  # files that keep no results: these are written beside them
# What goes with which artifact; the others go with all.
FITS: dict[str, tuple[Kind, ...]] = {
    "--target": ("run", "bundle"),
    "--set": ("run",),
    "--dry-run": ("run",),
    "--baseline": ("run",),
    "--golden": ("onnx",),
    "--engine": ("onnx",),
}
REPORTS = "ci"

Artifact = Annotated[Path, typer.Argument(help="A run folder, a bundle, an .onnx file, or a .slope file.")]
Ci = Annotated[
    bool, typer.Option("--ci", help="Write JUnit XML, JSON, SARIF and Markdown for a CI system into one folder.")
]
Require = Annotated[
    list[str] | None,
    typer.Option("--require", help="A check that must pass: `not checked` is then a failure. Repeatable."),
]
Baseline = Annotated[
    Path | None, typer.Option("--baseline", help="A run to compare with: fails where this one is worse than allowed.")
]
Trust = Annotated[
    bool, typer.Option("--trust-engine", help="Load an engine although no manifest has its sha256. An engine is code.")
]
Engine = Annotated[
    Path | None, typer.Option("--engine", help="With an .onnx file: an engine that `build` wrote from it.")
]
Golden = Annotated[
    Path | None, typer.Option("--golden", help="With an .onnx file: golden samples. Default: those beside it.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Where --ci writes; of a lone file all results, default NAME.verify."),
]


def command(
    artifact: Artifact,
    target: options.Target = None,
    ci: Ci = False,
    require: Require = None,
    baseline: Baseline = None,
    trust_engine: Trust = False,
    engine: Engine = None,
    golden: Golden = None,
    out: Out = None,
    settings: options.Set = None,
    json: options.Json = False,
    dry_run: options.DryRun = False,
) -> None:
    """Check weights, parity between the stages and the task metric; exit 1 if a check fails."""
    console = Console(json)
    kind = _kind(artifact)
    reports = Reports(console, artifact, (out or _results(artifact, kind)) if ci else None, among_results=kind in LONE)
    with reports.told():
        given = {
            "--target": target, "--set": settings, "--dry-run": dry_run,
            "--baseline": baseline, "--golden": golden, "--engine": engine,
        }  # fmt: skip
        _refuse(artifact, kind, given)
        if out is not None and kind not in LONE and not ci:
            raise RecipeError(
                f"--out {out}: {WORDS[kind]} keeps its results; --out is where --ci writes.", "Add --ci, or leave it."
            )
        if kind in LONE and trust_engine and engine is None:
            raise RecipeError("--trust-engine trusts nothing here: there is no engine.", "Name it with --engine.")
        if dry_run and ci:
            raise RecipeError("--ci writes reports, and --dry-run writes nothing.", "Leave one of them out.")
        if kind == "onnx":
            told = _verify_file(console, reports, artifact, golden, engine, trust_engine, out, require or [])
        elif kind == "packed":
            told = _verify_packed(console, reports, artifact, out, require or [])
        elif kind == "bundle":
            told = bundle.verify(console, reports, artifact, target, require or [], trust_engine)
        else:
            recipe = _required(options.recipe_of(artifact, settings or []), require or [])
            told = _verify_run(console, reports, artifact, recipe, target, baseline, trust_engine, dry_run)
    console.result(told)
    if told.get("verdict", "pass") != "pass":
        raise typer.Exit(1)


def _kind(artifact: Path) -> Kind:
    if bundle.is_bundle(artifact):
        return "bundle"
    if pack.is_packed(artifact):
        return "packed"
    return "onnx" if artifact.suffix == ".onnx" else "run"


def _results(artifact: Path, kind: Kind) -> Path:
    """Return where the reports go if nobody says."""
    if kind == "bundle":
        return bundle.folder_of(artifact) / REPORTS
    if kind == "run":
        return artifact / REPORTS
    from slope_compile.verify.single import default_out

    return default_out(artifact)


def _refuse(artifact: Path, kind: Kind, given: Mapping[str, object]) -> None:
    """Raise if an option was given that this artifact has no use for."""
    useless = [name for name, value in given.items() if value and kind not in FITS[name]]
    if useless:
        fitting = " or ".join(WORDS[one] for one in FITS[useless[0]])
        raise RecipeError(f"{artifact} is {WORDS[kind]}; {useless[0]} goes with {fitting}.", "Leave it out.")


def _required(recipe: Recipe, names: list[str]) -> Recipe:
    """Return the recipe with further checks required; the names are proved before anything runs.

    Raises:
        RecipeError: If there is no such check.
    """
    from slope_compile.verify.require import parse_required

    found = parse_required([*recipe.verify.require, *names])
    return recipe.model_copy(update={"verify": recipe.verify.model_copy(update={"require": list(found)})})


def _verify_run(
    console: Console,
    reports: Reports,
    run: Path,
    recipe: Recipe,
    target: list[str] | None,
    baseline: Path | None,
    trust_engine: bool,
    dry_run: bool,
) -> dict[str, Any]:
    targets = list(dict.fromkeys(target or recipe.build.targets))
    for name in target or []:  # asked for by name, an engine that was never built is no detail
        RunFolder.existing(run).require_record(f"build/{find_target(name).name}")
    asked = Asked(None if baseline is None else _baseline(baseline, run, recipe, targets), trust_engine)
    reports.prepare()
    # Always run: a check that was asked for is not answered from memory.
    stages = [f"verify/{name}" for name in targets]
    outcomes = options.execute(recipe, run, lambda _: stages, console, force=True, dry_run=dry_run, asked=asked)
    if dry_run:
        return {"run": str(run), "outcomes": options.outcomes_json(outcomes)}
    verdict = verdict_of(RunFolder.existing(run), targets)
    tell_verdict(console, verdict, lambda name: run / "verify" / str(name))
    return {**verdict, **reports.write("run", verdict)}


def _baseline(path: Path, run: Path, recipe: Recipe, targets: list[str]) -> RunFolder:
    from slope_compile.verify.baseline.check import open_baseline

    if path.resolve() == run.resolve():
        raise RecipeError(
            f"--baseline {path} is the run that is verified: it would be compared with itself, and always pass.",
            "Name the run of the last release.",
        )
    return open_baseline(path, recipe, targets)


def _verify_file(
    console: Console,
    reports: Reports,
    onnx: Path,
    golden: Path | None,
    engine: Path | None,
    trust_engine: bool,
    out: Path | None,
    require: list[str],
) -> dict[str, Any]:
    from slope_compile.verify.require import parse_required
    from slope_compile.verify.single import default_out, require_ours, verify_file

    required, folder, progress = parse_required(require), out or default_out(onnx), StageProgress(console)
    require_ours(folder)
    reports.prepare()
    with progress.drawing():
        verdict = verify_file(
            onnx, golden=golden, engine=engine, trust_engine=trust_engine, out=folder, required=required,
            events=Events(listeners=[progress]),
        ).to_json()  # fmt: skip
    tell_verdict(console, verdict, lambda _: folder)
    return {"onnx": str(onnx), "results": str(folder), **verdict, **reports.write("onnx", verdict)}


def _verify_packed(
    console: Console, reports: Reports, file: Path, out: Path | None, require: list[str]
) -> dict[str, Any]:
    from slope_compile.verify.packed import verify_packed
    from slope_compile.verify.require import parse_required
    from slope_compile.verify.single import default_out, require_ours

    required, folder, progress = parse_required(require), out or default_out(file), StageProgress(console)
    require_ours(folder)
    reports.prepare()
    with progress.drawing():
        verdict = verify_packed(file, out=folder, required=required, events=Events(listeners=[progress])).to_json()
    tell_verdict(console, verdict, lambda _: folder)
    return {"packed": str(file), "results": str(folder), **verdict, **reports.write("packed", verdict)}
