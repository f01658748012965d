"""One rank of a torchrun: trains each order of a JSON file and notes the digest of its weights after every epoch.

Orders: {"recipe", "folder"}. A run that is refused leaves the error's text in FOLDER/error-RANK.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from slope_compile.errors import SlopeCompileError
from slope_compile.events import Events
from slope_compile.recipe import recipe_from
from slope_compile.train import loop
from slope_compile.train.engine import state_digest

torch.set_num_threads(1)
rank = os.environ["RANK"]
agree = loop.refuse_drift
for order in json.loads(Path(sys.argv[1]).read_text()):
    digests: list[str] = []

    def note(accelerator: loop.Accelerator, model: torch.nn.Module, digests: list[str] = digests) -> None:
        digests.append(state_digest(model))
        agree(accelerator, model)

    loop.refuse_drift = note
    folder = Path(order["folder"])
    try:
        loop.train(recipe_from(order["recipe"], "test"), folder / "out", folder / "state", Events())
        (folder / f"digests-{rank}").write_text("\n".join(digests))
    except SlopeCompileError as error:
        (folder / f"error-{rank}").write_text(str(error))
