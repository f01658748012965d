"""The chain: which places are compared, and the runs that Polygraphy's own tools open."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from polygraphy.tools import main
from torch import nn
from verify_twins import CHANNELS, SIDE, Twin, TwinModel, initializer

import slope_compile as sc
from slope_compile.verify.chain import saved
from slope_compile.verify.model import verify_model

PLACES = ("trained", "folded", "onnx", "onnx-default", "placed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A compressed twin, its file, its golden samples and a file that was placed."""
    folder = tmp_path_factory.mktemp("chain")
    torch.manual_seed(0)
    model = TwinModel().eval()
    sc.compress(model, bits=4, pattern="2:4", first_last_bits=8)
    codes = {
        name: replace(coded, codes=coded.codes.numpy(), scale=coded.scale.numpy())
        for name, coded in sc.codes(model).items()
    }
    twin = Twin(codes, model.fc.bias.detach().numpy(), container="INT8")
    return SimpleNamespace(
        model=model, codes=codes, twin=twin, onnx=twin.write(folder / "m.onnx"), placed=twin.write(folder / "p.onnx"),
        golden=twin.golden(folder / "g.safetensors"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def out(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return verified(made, tmp_path_factory.mktemp("out"))


def verified(made: SimpleNamespace, out: Path, **changes: Any) -> Path:
    given = {"codes": made.codes, "model": made.model, "golden": made.golden, "placed": made.placed, **changes}
    verify_model(made.onnx, out=out, **given)
    return out


def test_every_hop_names_its_places(made: SimpleNamespace) -> None:
    verdict = verify_model(made.onnx, codes=made.codes, model=made.model, golden=made.golden, placed=made.placed)
    assert verdict.verdict == "pass"
    hops = {name: (check["from"], check["to"]) for name, check in ((c.name, c.figures) for c in verdict.checks)
            if "from" in check}  # fmt: skip
    assert hops == {
        "parity.folded": ("trained", "folded"),
        "parity.onnx": ("folded", "onnx"),
        "parity.onnx-default": ("onnx", "onnx-default"),
        "parity.placed": ("onnx", "placed"),
        "parity.engine": ("onnx", "engine"),
        "agreement": ("trained", "onnx-default"),
    }
    assert verdict["parity.folded"].figures["bit_equal"] is True
    assert verdict["parity.folded"].figures["relative"] == 0
    assert "of the folded model" in verdict["parity.onnx"].detail


def test_a_model_that_cannot_be_copied_is_compared_as_it_is(made: SimpleNamespace) -> None:
    class Uncopied(TwinModel):
        def __deepcopy__(self, memo: object) -> Uncopied:
            raise RuntimeError("it holds a lock")

    model = Uncopied().eval()
    model.load_state_dict(TwinModel().state_dict())
    sc.compress(model, bits=4, pattern="2:4", first_last_bits=8)
    verdict = verify_model(made.onnx, model=model)
    assert verdict["parity.folded"].status == "not checked"
    assert "it holds a lock" in verdict["parity.folded"].detail
    assert verdict["parity.onnx"].figures["from"] == "trained"


def test_weights_that_are_not_codes_times_scales_fail_the_fold(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias = nn.Parameter(module.bias + 0.01)

    monkeypatch.setattr("slope_compile.compression.api.fold", wrong)
    verdict = verify_model(made.onnx, model=made.model, golden=made.golden)
    found = verdict["parity.folded"]
    assert found.status == "fail" and "with its weights folded" in found.detail
    assert found.figures["bit_equal"] is False and found.figures["relative"] > found.figures["tolerance"]


def test_the_runs_are_saved_with_their_names(out: Path, made: SimpleNamespace) -> None:
    assert sorted(path.name for path in (out / "chain").iterdir()) == sorted(
        f"{name}.json" for name in (*PLACES, "inputs", "samples")
    )
    (feed,) = load_json(str(out / "chain/inputs.json"))
    assert feed["input"].shape == (5, CHANNELS, SIDE, SIDE) and feed["input"].dtype == np.float32
    for place in PLACES:
        results = RunResults.load(str(out / f"chain/{place}.json"))
        ((name, (iteration,)),) = results.items()
        assert name == iteration.runner_name == place and iteration.runtime == 0
        assert iteration["output"].shape == (5, 6)
    with torch.no_grad():
        expected = made.model(torch.from_numpy(feed["input"])).numpy()
    np.testing.assert_array_equal(RunResults.load(str(out / "chain/trained.json"))["trained"][0]["output"], expected)
    assert json.loads((out / "chain/samples.json").read_text()) == {
        "saved": 5, "of": 5, "bytes_at_most": saved.MAX_BYTES,
    }  # fmt: skip


def test_the_same_files_give_the_same_bytes(out: Path, made: SimpleNamespace, tmp_path: Path) -> None:
    again = verified(made, tmp_path / "again")
    files = [path.relative_to(out) for path in out.rglob("*.json")]
    assert len(files) == len(PLACES) + 3
    assert all((out / path).read_bytes() == (again / path).read_bytes() for path in files)


def polygraphy(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run Polygraphy's command line, in this process: a new one takes seconds to start."""
    monkeypatch.setattr(sys, "argv", ["polygraphy", *map(str, arguments)])
    try:
        return int(main() or 0)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Polygraphy's command line
def test_polygraphys_own_tools_open_and_replay_the_runs(
    out: Path, made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    chain = out / "chain"
    assert polygraphy(monkeypatch, "inspect", "data", chain / "folded.json") == 0
    shown = capfd.readouterr().out
    assert "folded (1 iterations)" in shown and "shape=(5, 6)" in shown
    replay = ("run", made.onnx, "--onnxrt", "--load-inputs", chain / "inputs.json", "--load-outputs")
    assert polygraphy(monkeypatch, *replay, chain / "trained.json") == 0
    other = RunResults.load(str(chain / "trained.json"))
    other["trained"][0]["output"] = other["trained"][0]["output"] + 1
    other.save(str(tmp_path / "other.json"))
    assert polygraphy(monkeypatch, *replay, tmp_path / "other.json") == 1


def test_as_many_samples_are_saved_as_fit(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "MAX_BYTES", 3 * CHANNELS * SIDE * SIDE * 4 + 5)
    out = verified(made, tmp_path)
    (feed,) = load_json(str(out / "chain/inputs.json"))
    assert len(feed["input"]) == 3
    assert RunResults.load(str(out / "chain/onnx.json"))["onnx"][0]["output"].shape == (3, 6)
    assert json.loads((out / "chain/samples.json").read_text())["saved"] == 3
    monkeypatch.setattr(saved, "MAX_BYTES", 1)
    again = verified(made, tmp_path)  # and what was there before is gone
    assert [path.name for path in (again / "chain").iterdir()] == ["samples.json"]
    assert json.loads((again / "chain/samples.json").read_text())["saved"] == 0


def test_without_torch_the_golden_outputs_stand_in(made: SimpleNamespace, tmp_path: Path) -> None:
    out = verified(made, tmp_path, model=None)
    results = RunResults.load(str(out / "chain/trained.json"))
    assert list(results.keys()) == ["golden"]
    assert not (out / "chain/folded.json").exists() and (out / "chain/onnx.json").is_file()


def test_a_file_that_does_not_load_leaves_no_runs(made: SimpleNamespace, tmp_path: Path) -> None:
    broken = tmp_path / "m.onnx"
    broken.write_bytes(b"hello")
    verify_model(broken, golden=made.golden, out=tmp_path / "out")
    assert list((tmp_path / "out/chain").iterdir()) == []
    assert json.loads((tmp_path / "out/layers.json").read_text()) == {"hops": [], "layers": []}


def test_each_layer_has_an_error_at_each_hop(out: Path) -> None:
    layers = json.loads((out / "layers.json").read_text())
    hops = ["parity.folded", "parity.onnx", "parity.onnx-default", "parity.placed"]
    assert [hop["check"] for hop in layers["hops"]] == hops
    assert layers["hops"][1] == {"check": "parity.onnx", "from": "folded", "to": "onnx"}
    assert [(row["name"], row["operator"]) for row in layers["layers"]] == [
        ("conv1", "Conv"), ("conv2", "Conv"), ("fc", "Gemm"),
    ]  # fmt: skip
    for row in layers["layers"]:
        assert list(row["errors"]) == hops
        assert all(error["relative"] <= error["allowed"] for error in row["errors"].values())


def test_a_hop_that_fails_names_the_layer_and_writes_a_reproducer(made: SimpleNamespace, tmp_path: Path) -> None:
    def double(model: onnx.ModelProto) -> None:
        scale = initializer(model, "conv2.weight.scale")
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(2), scale.name))

    path = made.twin.write(tmp_path / "m.onnx", double)
    found = verify_model(path, model=made.model, golden=made.golden, out=tmp_path)["parity.onnx"]
    diverges = found.figures["diverges"]
    assert found.status == "fail"
    assert (diverges["layer"], diverges["operator"]) == ("conv2", "Conv")
    assert "conv2" in found.detail and diverges["reproducer"] in found.detail
    assert diverges["command"].startswith("polygraphy run ")
    assert diverges["reproducer"] == "reproducer/parity.onnx"
    assert {path.name for path in (tmp_path / "reproducer/parity.onnx").iterdir()} >= {"model.onnx", "command.txt"}
    assert "reference" in diverges and "tested" in diverges
