"""Train every arm on every seed and write the figures, going on where an earlier run of the same file stopped.

    OMP_NUM_THREADS=1 python -m benchmarks.ablation --out benchmarks/results/ablation-small.json --jobs 2

`--scale small` takes 2 CPU cores about an hour; `--scale long` fine-tunes four times, `full` ten times as long. `--set
main study` adds the open questions and the single ingredients; `--set tuning` tries strengths (on seeds of its own).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ablation.arms import main_arms, study_arms, tuning_arms
from benchmarks.ablation.experiment import SCALES, run_seed
from benchmarks.ablation.plot import plot
from benchmarks.ablation.summary import summarize
from slope_compile import machine
from slope_compile.artifacts import write_atomically

SETS = {"main": main_arms, "study": study_arms, "tuning": tuning_arms}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the result file; print the summary; draw the plot beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", choices=SETS, nargs="+", default=["main"], dest="chosen")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these, of the sets chosen")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    arms = [arm for name in options.chosen for arm in SETS[name]()]
    if options.arms:
        if unknown := set(options.arms) - {arm.name for arm in arms}:
            parser.error(f"no arm {sorted(unknown)[0]!r}; there are: {', '.join(arm.name for arm in arms)}")
        arms = [arm for arm in arms if arm.name in options.arms]
    rows = _known(options.out, options.scale)
    missing = {
        seed: [a for a in arms if not any(r["seed"] == seed and r["arm"] == a.name for r in rows)]
        for seed in options.seeds
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        work = [pool.submit(run_seed, seed, todo, SCALES[options.scale]) for seed, todo in missing.items() if todo]
        for done in as_completed(work):
            rows = sorted(rows + done.result(), key=lambda row: (row["seed"], row["arm"]))
            _write(options.out, rows, options.scale, sys.argv[1:] if arguments is None else arguments)
    if not rows:
        parser.error("no seed was given")
    summary = summarize(rows)
    for name, figures in summary.items():
        difference = figures.get(f"against none {name.split()[-1]}")
        beside = (
            ""
            if difference is None
            else f"  {difference['mean']:+.2f} ± {difference.get('ci95', float('nan')):.2f} against none"
        )
        print(f"{name:32} {figures['mean']:.2f} ± {figures['sd']:.2f}  cosine {figures['cosine']}{beside}")
    plot(summary, options.out.with_suffix(".svg"))


def _known(path: Path, scale: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    if document["scale"] != {"name": scale, **asdict(SCALES[scale])}:
        raise SystemExit(f"{path} holds another scale, {document['scale']['name']}: choose another file.")
    return list(document["rows"])


def _write(path: Path, rows: list[dict[str, Any]], scale: str, arguments: Sequence[str]) -> None:
    document = {
        "command": f"python -m benchmarks.ablation {shlex.join(arguments)}",
        "scale": {"name": scale, **asdict(SCALES[scale])},
        "versions": machine.versions(),
        "machine": {key: value for key, value in machine.machine().items() if key in ("cores", "gpus")},
        "summary": summarize(rows),
        "rows": rows,
    }
    write_atomically(path, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
