"""`slope-compile run`: all stages."""

from __future__ import annotations

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.metric_names import words
from slope_compile.recipe import load_recipe
from slope_compile.summary import build_of, summarize, verdict_of
from slope_compile_cli import options
from slope_compile_cli.console import Console
from slope_compile_cli.explained import tell_verdict
from slope_compile_cli.gate import Gate


def command(
    recipe: options.RecipeArgument,
    out: options.Out = None,
    settings: options.Set = None,
    json: options.Json = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> None:
    """Train, export, build and verify; unchanged stages are skipped, an interrupted run goes on."""
    console, sets = Console(json), settings or []
    resolved = load_recipe(recipe, sets)
    gate = Gate(resolved.build.require)
    folder = out or options.default_out(recipe, sets)
    outcomes = options.execute(resolved, folder, lambda p: p.stages("verify"), console, force=force, dry_run=dry_run)
    if dry_run:
        console.result({"run": str(folder), "outcomes": options.outcomes_json(outcomes)})
        return
    run = RunFolder.existing(folder)
    verdict = verdict_of(run, resolved.build.targets)
    summary = summarize(run)
    print_summary(console, summary)
    for target in dict.fromkeys(resolved.build.targets):
        console.say(f"{target}: {summary['engines'][target]}")
        gate.judge(console, f"build/{target}", build_of(run, f"build/{target}"))
    tell_verdict(console, verdict, lambda name: folder / "verify" / str(name))
    console.say(f"report: {folder / 'report.html'}")
    told = {"outcomes": options.outcomes_json(outcomes), "report": str(folder / "report.html")}
    console.result({**verdict, **summary, **told, "requirements": gate.to_json()})
    if verdict["verdict"] != "pass":
        raise typer.Exit(1)
    gate.close(console)


def print_summary(console: Console, summary: dict[str, object]) -> None:
    """Print metrics and sizes."""
    accuracies, others, sizes = summary["accuracies"], summary["other_metrics"], summary["sizes"]
    assert isinstance(accuracies, dict) and isinstance(others, dict) and isinstance(sizes, dict)
    intervals = summary["intervals"]
    assert isinstance(intervals, dict)
    for metric, values in {str(summary["metric"]): accuracies, **others}.items():
        shown = {name: None if value is None else f"{100 * value:.2f} %" for name, value in values.items()}
        for name, interval in (("onnx", intervals[metric]["onnx"]), ("drop", intervals[metric]["drop"])):
            if interval is not None:
                shown[f"{name}, 95 %"] = f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f} %"
        console.table(words(metric), list(shown), [list(shown.values())])
    rows = [
        (name, row["weights"], f"{row['weights_ratio']}x", row["model"], f"{row['model_ratio']}x")
        for name, row in sizes.items()
        if row is not None
    ]
    console.table("bytes", ["what", "weights", "ratio", "model", "ratio"], rows)
