from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Warm, start
from onnx import numpy_helper
from safetensors.numpy import load_file

from slope_compile.build.engine import build_engine
from slope_compile.events import Events
from slope_compile.recipe import load_recipe

pytestmark = pytest.mark.e2e
RUN = Path("runs/tiny")


def digests(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / RUN / "manifest.json").read_text())
    return {path: d["sha256"] for stage in manifest["stages"].values() for path, d in stage["outputs"].items()}


def weights_of(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def test_run_json_tells_verdict_layers_sizes_and_accuracies(finished: Path) -> None:
    told = json.loads((finished / "run.json").read_text())
    assert told["verdict"] == "pass"
    status = {check["name"]: check["status"] for check in told["checks"]}
    assert (
        status["pattern"]
        == status["codes"]
        == status["packed"]
        == status["parity.onnx"]
        == status["metric"]
        == status["digest"]
        == "pass"
    )
    assert status["parity.engine"] == "not checked"
    assert set(told["accuracies"]) == {"fp32", "compressed", "onnx"}
    assert all(0.5 < accuracy <= 1 for accuracy in told["accuracies"].values())
    intervals = told["intervals"]["accuracy"]
    assert intervals["onnx"][0] < told["accuracies"]["onnx"] <= intervals["onnx"][1]
    assert intervals["drop"][0] < intervals["drop"][1] and isinstance(intervals["certain"], bool)
    assert [o["action"] for o in told["outcomes"]] == ["done"] * 5
    assert {row["name"]: (row["bits"], row["pattern"]) for row in told["layers"]} == {
        "0": (8, None), "3": (4, "2:4"), "6": (4, "2:4"), "11": (4, None), "13": (4, "2:4"), "15": (8, None),
    }  # fmt: skip
    assert told["sizes"]["file"]["model"] == (finished / RUN / "export/model.onnx").stat().st_size


def test_the_exported_file_opened_with_onnx_alone(finished: Path) -> None:
    path = finished / RUN / "export/model.onnx"
    assert {i.domain: i.version for i in onnx.load(path).opset_import} == {"": 21}
    stored, codes = weights_of(path), load_file(finished / RUN / "train/codes.safetensors")
    expected = {"0": "INT8", "3": "INT4", "6": "INT4", "11": "INT4", "13": "INT4", "15": "INT8"}
    for layer, dtype in expected.items():
        tensor = stored[f"{layer}.weight.codes"]
        assert onnx.TensorProto.DataType.Name(tensor.data_type) == dtype
        values = numpy_helper.to_array(tensor).astype(np.int8)
        np.testing.assert_array_equal(values, codes[f"{layer}.weight.codes"])
        assert f"{layer}.weight" not in stored
        if layer in ("3", "6", "13"):
            groups = np.moveaxis(values, 1, -1).reshape(-1, 4)
            assert (np.count_nonzero(groups, axis=1) <= 2).all()
            assert np.count_nonzero(values)


def test_the_same_command_again_skips_everything_and_keeps_every_byte(finished: Path, cli: Any) -> None:
    before = digests(finished)
    again = cli("run", "tiny.yaml", "--json", cwd=finished)
    assert again.returncode == 0
    assert [o["action"] for o in json.loads(again.stdout)["outcomes"]] == ["skipped"] * 5
    assert digests(finished) == before


def test_dry_run_writes_nothing_and_names_the_reason(finished: Path, tmp_path: Path, cli: Any) -> None:
    planned = cli("run", "tiny.yaml", "--dry-run", "--set", "build.batch.max=32", cwd=finished)
    assert planned.returncode == 0
    assert "train: skipped" in planned.stdout
    assert "export: skipped" in planned.stdout
    assert "build/a100: would run (changed: recipe)" in planned.stdout
    assert "verify/a100: would run" in planned.stdout
    nowhere = cli("run", "tiny.yaml", "--dry-run", "--out", str(tmp_path / "new"), cwd=finished)
    assert nowhere.returncode == 0
    assert not (tmp_path / "new").exists()


def test_killed_at_random_moments_the_run_ends_with_the_same_digests(
    finished: Path, tmp_path: Path, warm: Warm
) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in ("tiny.py", "tiny.yaml"):
        shutil.copy(finished / name, folder)
    rng = random.Random(7)
    kills = 0
    while kills < 10:
        process = warm.start(["run", "tiny.yaml"], folder)
        time.sleep(rng.uniform(0.2, 4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate(timeout=60)
        if process.returncode == 0:  # finished before the kill: begin again, with fewer seconds
            assert digests(folder) == digests(finished)
            shutil.rmtree(folder / "runs")
    process = warm.start(["run", "tiny.yaml"], folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert digests(folder) == digests(finished)


def test_interrupted_exits_130_and_goes_on(finished: Path, tmp_path: Path, cli: Any) -> None:
    for name in ("tiny.py", "tiny.yaml"):
        shutil.copy(finished / name, tmp_path)
    process = start(["run", "tiny.yaml", "--json"], tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/tiny/train.state/state.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["error"]["exit_code"] == 130
    assert "Traceback" not in err
    done = cli("run", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch" in done.stderr
    assert digests(tmp_path) == digests(finished)


def test_the_engine_does_not_depend_on_what_lies_on_the_search_path(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python lists the folders that it imports from; what that left on the heap used to reorder some engines."""
    run = finished / RUN
    section = load_recipe(run / "recipe.yaml").build
    for seed in (18, 26, 27, 29):  # of the first thirty, those that made other bytes then
        rng = random.Random(seed)
        folder = tmp_path / str(seed) / ("x" * rng.randrange(1, 200))
        folder.mkdir(parents=True)
        for number in range(rng.randrange(400)):
            (folder / f"{'f' * rng.randrange(100)}{number}").touch()
        out = tmp_path / f"out{seed}"
        out.mkdir()
        with monkeypatch.context() as path:
            path.setattr(sys, "path", [sys.path[0], str(folder), *sys.path[1:]])
            build_engine(run / "export/model.onnx", "a100", section, out, Events())
        assert (out / "model.engine").read_bytes() == (run / "build/a100/model.engine").read_bytes()


def edit(path: Path, change: Any) -> None:
    model = onnx.load(path)
    change({tensor.name: tensor for tensor in model.graph.initializer})
    onnx.save(model, path)


def flip_a_nibble(stored: dict[str, onnx.TensorProto]) -> None:
    raw = bytearray(stored["3.weight.codes"].raw_data)
    raw[5] ^= 0x10
    stored["3.weight.codes"].raw_data = bytes(raw)


def negate_a_scale(stored: dict[str, onnx.TensorProto]) -> None:
    scale = numpy_helper.to_array(stored["3.weight.scale"]).copy()
    scale[2] *= -1
    stored["3.weight.scale"].CopyFrom(numpy_helper.from_array(scale, "3.weight.scale"))


def break_the_mask(stored: dict[str, onnx.TensorProto]) -> None:
    raw = bytearray(stored["3.weight.codes"].raw_data)
    raw[:100] = b"\x11" * 100
    stored["3.weight.codes"].raw_data = bytes(raw)


def transpose_a_tensor(stored: dict[str, onnx.TensorProto]) -> None:
    dims = stored["3.weight.codes"].dims
    codes = numpy_helper.to_array(stored["3.weight.codes"])
    turned = numpy_helper.from_array(np.ascontiguousarray(codes.swapaxes(2, 3)), "3.weight.codes")
    assert list(turned.dims) == list(dims)
    stored["3.weight.codes"].CopyFrom(turned)


@pytest.mark.parametrize("change", [flip_a_nibble, negate_a_scale, break_the_mask, transpose_a_tensor])
def test_verify_exits_1_and_names_the_damaged_tensor(copy: Path, cli: Any, change: Any) -> None:
    edit(copy / RUN / "export/model.onnx", change)
    done = cli("verify", str(RUN), "--json", cwd=copy)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["verdict"] == "fail"
    status = {check["name"]: check for check in told["checks"]}
    assert status["digest"]["status"] == "fail"
    assert "export/model.onnx" in status["digest"]["detail"]
    failed = [check for check in told["checks"] if check["status"] == "fail" and "3.weight" in check["detail"]]
    assert failed, told["checks"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "file", ["export/model.onnx", "train/codes.safetensors", "train/checkpoint.safetensors", "build/a100/model.engine"]
)
def test_a_truncated_artifact_fails_verify_and_is_refused_elsewhere(copy: Path, cli: Any, file: str) -> None:
    path = copy / RUN / file
    path.write_bytes(path.read_bytes()[:-7])
    verified = cli("verify", str(RUN), "--json", cwd=copy)
    assert verified.returncode == 1, verified.stderr
    digest = next(check for check in json.loads(verified.stdout)["checks"] if check["name"] == "digest")
    assert digest["status"] == "fail"
    assert file in digest["detail"]
    ran = cli("run", "tiny.yaml", cwd=copy)
    assert ran.returncode == 2
    assert file in ran.stderr
    assert "--force" in ran.stderr
    assert "Traceback" not in ran.stderr + verified.stderr


def test_a_folder_of_another_recipe_is_refused_and_kept(copy: Path, cli: Any) -> None:
    before = digests(copy)
    done = cli("run", "tiny.yaml", "--set", "train.lr=0.5", "--out", str(RUN), cwd=copy)
    assert done.returncode == 2
    assert "train.lr is 0.02 there and 0.5 here" in done.stderr
    assert digests(copy) == before


def test_settings_that_change_training_get_a_folder_of_their_own(finished: Path, cli: Any) -> None:
    done = cli("run", "tiny.yaml", "--set", "compression.bits=2", "--dry-run", "--json", cwd=finished)
    assert json.loads(done.stdout)["run"] == "runs/tiny+bits=2"
    assert "train: would run (not made yet)" in done.stderr


def test_the_report_is_there_and_refers_to_nothing_outside(finished: Path) -> None:
    page = (finished / RUN / "report.html").read_text()
    assert "pass" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_build_of_a_foreign_onnx_file(finished: Path, tmp_path: Path, cli: Any) -> None:
    shutil.copy(finished / RUN / "export/model.onnx", tmp_path / "m.onnx")
    settings = ("--set", "build.precision=fp32", "--set", "build.batch.max=8")
    done = cli("build", "m.onnx", "--target", "rtx-ada", *settings, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["header"]["precision"] == "fp32"
    assert next(iter(told["header"]["profile"].values()))["max"][0] == 8
    assert told["summary"]["held"] == told["summary"]["coded"] == 6
    assert (tmp_path / "m.rtx-ada.engine").stat().st_size > 0
    assert hashlib.sha256((tmp_path / "m.rtx-ada.engine").read_bytes()).hexdigest()


def test_inspect_json_of_a_run(finished: Path, cli: Any) -> None:
    told = json.loads(cli("inspect", str(RUN), "--json", cwd=finished).stdout)
    assert set(told["sizes"]) == {"fp32", "nominal", "packed", "file"}
    assert told["sizes"]["packed"]["model"] == (finished / RUN / "model.slope").stat().st_size
    assert told["sizes"]["packed"]["weights_ratio"] > told["sizes"]["file"]["weights_ratio"]
    sparse = next(row for row in told["layers"] if row["name"] == "3")
    assert 0 < sparse["density"] <= 0.5
    assert sparse["engine"]["a100"]["dtype"] == "Int4"


def test_stages_one_by_one(tmp_path: Path, workplace: Path, cli: Any) -> None:
    for name in ("tiny.py", "tiny.yaml"):
        shutil.copy(workplace / name, tmp_path)
    early = cli("export", "r", cwd=tmp_path)
    assert (early.returncode, "r does not exist" in early.stderr) == (2, True)
    commands = [
        ["train", "tiny.yaml", "--out", "r"],
        ["export", "r"],
        ["pack", "r"],
        ["build", "r", "--target", "rtx-ampere"],
        ["verify", "r", "--target", "rtx-ampere"],
    ]
    for command in commands:
        done = cli(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "r/verify/rtx-ampere/junit.xml").exists()


def test_done_processes_leave_no_partial_folders(finished: Path) -> None:
    assert not list((finished / RUN).glob("**/*.partial"))
    assert not (finished / RUN / "train.state").exists()


def test_the_chain_with_activations_of_4_bits(workplace: Path, tmp_path: Path, cli: Any) -> None:
    for name in ("tiny.py", "tiny.yaml"):
        shutil.copy(workplace / name, tmp_path)
    sets = ("compression.activation_bits=4", "compression.quantize_outputs=true", "train.pretrain_epochs=1",
            "train.epochs=1", "verify.metric_drop=1.0")  # fmt: skip
    done = cli("run", "tiny.yaml", "--json", *(word for s in sets for word in ("--set", s)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    checks = {check["name"]: check for check in told["checks"]}
    assert told["verdict"] == checks["parity.onnx"]["status"] == checks["codes"]["status"] == "pass"
    assert checks["parity.onnx"]["figures"]["quantizers"] >= 6
    run = tmp_path / told["run"]
    built = json.loads((run / "build/a100/layers.json").read_text())
    assert {row["placement"] for row in built["layers"]} == {"sparse-int8", "int8"}
    assert built["summary"]["int8"] == {"declared": 6, "multiplied": 6}
    plan = json.loads((run / "train/metrics.json").read_text())["plan"]
    assert [row["activation_bits"] for row in plan] == [8, 4, 4, 4, 4, 8]
