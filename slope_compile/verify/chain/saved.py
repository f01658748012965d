"""The runs of a chain as files that Polygraphy's own tools open: `polygraphy inspect data`, `polygraphy run`.

`chain/inputs.json` holds the golden samples (`--load-inputs`), `chain/PLACE.json` what each place gave for them
(`--load-outputs`), as many samples as fit a bound, and `chain/samples.json` how many of how many. The same runs give
the same bytes: Polygraphy notes how long a run took, and these note 0.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Final

from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json

from slope_compile.artifacts import storage_errors
from slope_compile.qdq.tensors import load_model
from slope_compile.verify.chain.places import PLACES, TRAINED, Chain
from slope_compile.verify.chain.runners import Array, Arrays, quiet, samples_of

MAX_BYTES = 2**25  # of arrays in a file; base64 makes 4 bytes of 3
FOLDER: Final = "chain"
INPUTS: Final = "inputs"
COUNT: Final = "samples"


def save_chain(chain: Chain, out: Path) -> None:
    """Write what ran into `out/chain`; files of an earlier verification that are not written anew are removed.

    Raises:
        StorageError: If the file system refuses.
    """
    runs = dict(_runs(chain))
    folder = out / FOLDER
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*PLACES, INPUTS, COUNT):
            (folder / f"{name}.json").unlink(missing_ok=True)
        if not runs:
            return
        rows = samples_of(runs[INPUTS][1])
        kept = _that_fit([feed for _, feed in runs.values()], rows, chain)
        text = json.dumps({"saved": kept, "of": rows, "bytes_at_most": MAX_BYTES})
        (folder / f"{COUNT}.json").write_text(text + "\n", encoding="utf-8")
        if not kept:
            return
        with quiet():
            for place, (name, feed) in runs.items():
                arrays = OrderedDict((tensor, _cut(array, kept, rows)) for tensor, array in feed.items())
                path = str(folder / f"{place}.json")
                if place == INPUTS:
                    save_json([arrays], path)
                else:
                    result = RunResults()
                    result.append((name, [IterationResult(arrays, runtime=0, runner_name=name)]))
                    result.save(path)


def _runs(chain: Chain) -> dict[str, tuple[str, Arrays]]:
    """Return what is saved: file -> the name of its run and the arrays of the first feed, which are the golden ones."""
    try:
        feeds = chain.feeds()
    except Exception:  # what is wrong with them is what the checks say
        return {}
    if not feeds or not chain.ran:
        return {}
    runs: dict[str, tuple[str, Arrays]] = {INPUTS: (INPUTS, feeds[0])}
    if TRAINED not in chain.ran and chain.golden is not None:
        runs[TRAINED] = ("golden", chain.golden().outputs)
    runs |= {place: (place, chain.ran[place][0]) for place in PLACES if chain.ran.get(place)}
    return runs


def _that_fit(feeds: list[Arrays], rows: int, chain: Chain) -> int:
    """Return how many of the samples are within the bound in every file: all or none where the batch is fixed."""
    most = max(sum(array.nbytes for array in feed.values()) for feed in feeds)
    if most <= MAX_BYTES:
        return rows
    graph = load_model(chain.onnx).graph
    first = [value.type.tensor_type.shape.dim[0] for value in graph.input if value.type.tensor_type.shape.dim]
    return MAX_BYTES * rows // most if first and all(not axis.HasField("dim_value") for axis in first) else 0


def _cut(array: Array, kept: int, rows: int) -> Array:
    return array[:kept] if array.shape[:1] == (rows,) else array
