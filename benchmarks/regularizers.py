"""Accuracy and alignment of each regularizer on the digits demo, five seeds, side by side.

    OMP_NUM_THREADS=1 python benchmarks/regularizers.py --out benchmarks/results/regularizers-digits.json

For each seed: FP32 once, then from those same weights every arm with the demo's own recipe and schedule. `fp32-longer`
trains the fine-tuning epochs on without compression, so that the extra epochs are not mistaken for a gain. Paired by
seed. Finished seeds are kept in the result file: the same command goes on from there, and two processes may share the
seeds of one file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from slope_compile import machine
from slope_compile.artifacts import write_atomically
from slope_compile.events import Events
from slope_compile.recipe import load_recipe
from slope_compile.train.checkpoint import portable
from slope_compile.train.loop import Trainer, train

RECIPE = "digits-resnet18"
ARMS = [(bits, regularizer) for bits in (4, 2) for regularizer in ("none", "l2", "sr-ste", "cosine")]


def main() -> None:
    """Run what is missing in the result file and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        if all(row["seed"] != seed for row in known(arguments.out)):
            rows = run_seed(seed)
            write(arguments.out, sorted(known(arguments.out) + rows, key=lambda row: int(row["seed"])))
    for name, arm in summarize(known(arguments.out)).items():
        print(
            f"{name:14} accuracy {arm['accuracy_mean']:.4f} (sd {arm['accuracy_sd']:.4f})  cosine {arm['cosine_mean']}"
        )


def known(path: Path) -> list[dict[str, Any]]:
    """Return the rows measured so far."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def run_seed(seed: int) -> list[dict[str, Any]]:
    """Train FP32 and every arm for one seed; one row each."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        weights = work / "fp32.safetensors"
        base = load_recipe(RECIPE, [f"train.seed={seed}"])
        trainer = Trainer(base, work / "state", Events())
        trainer.run_phase(trainer.fp32, 0, None)
        save_file(portable(trainer.model.state_dict()), weights)
        rows = [{"seed": seed, "arm": "fp32", "accuracy": trainer.history["epochs"][-1]["accuracy"]}]
        again = [f"train.seed={seed}", f"model.weights={weights}"]
        longer = load_recipe(
            RECIPE, [*again, f"train.pretrain_epochs={base.train.epochs}", f"train.pretrain_lr={base.train.lr}"]
        )
        trainer = Trainer(longer, work / "longer", Events())
        trainer.run_phase(trainer.fp32, 0, None)
        rows.append({"seed": seed, "arm": "fp32-longer", "accuracy": trainer.history["epochs"][-1]["accuracy"]})
        for bits, regularizer in ARMS:
            arm = [f"compression.bits={bits}", f"compression.regularizer={regularizer}", "train.pretrain_epochs=0"]
            rows.append(
                run_arm(
                    load_recipe(RECIPE, [*again, *arm]), work / f"{regularizer}{bits}", seed, f"{regularizer} W{bits}"
                )
            )
    return rows


def run_arm(recipe: Any, out: Path, seed: int, name: str) -> dict[str, Any]:
    """Train one arm and return its row: accuracy, and the mean over the sparse layers of cosine, SQNR and density."""
    out.mkdir()
    started = time.monotonic()
    train(recipe, out, out / "state", Events())
    metrics = json.loads((out / "metrics.json").read_text())
    sparse = [metrics["layers"][row["name"]] for row in metrics["plan"] if row["pattern"]]
    means = {key: statistics.fmean(layer[key] for layer in sparse) for key in ("cosine", "sqnr_db", "density")}
    accuracy = metrics["compressed"]["accuracy"]
    return {"seed": seed, "arm": name, "accuracy": accuracy, **means, "seconds": round(time.monotonic() - started, 1)}


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return arm -> means and standard deviations over seeds."""
    summary = {}
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        accuracies = [row["accuracy"] for row in mine]
        cosines = [row["cosine"] for row in mine if "cosine" in row]
        summary[name] = {
            "seeds": len(mine),
            "accuracy_mean": round(statistics.fmean(accuracies), 5),
            "accuracy_sd": round(statistics.stdev(accuracies), 5) if len(mine) > 1 else 0.0,
            "cosine_mean": round(statistics.fmean(cosines), 5) if cosines else None,
        }
    return summary


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows, summary, and what they were measured on."""
    document = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/regularizers.py --out {path}",
        "recipe": RECIPE,
        "validation_images": 359,
        "machine": {key: value for key, value in machine.machine().items() if key in ("cores", "gpus")},
        "versions": machine.versions(),
        "summary": summarize(rows),
        "rows": rows,
    }
    write_atomically(path, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
