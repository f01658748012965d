"""Building and verifying a bundle, with real engines of TensorRT-RTX."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from bundle_files import changed, with_contents
from onnx import numpy_helper

import slope_compile.bundle.build as build_module
from slope_compile.artifacts import RunFolder
from slope_compile.bundle.archive import opened_bundle
from slope_compile.bundle.build import EngineOutcome, build_bundle, require_here
from slope_compile.bundle.contents import INDEX, Contents
from slope_compile.bundle.opened import default_folder, is_bundle, open_bundle
from slope_compile.bundle.verify import verify_bundle
from slope_compile.codes_file import load_codes, save_codes
from slope_compile.errors import ArtifactError, BackendError, CheckFailedError, StorageError
from slope_compile.events import Events
from slope_compile.targets.backends import BACKENDS
from slope_compile.verify.verdict import Verdict

ROW = json.dumps(
    {"layers": [
        {"name": "c.weight", "op": "Conv", "placement": "int4-storage", "reason": "asked", "container": "INT4",
         "bits": 4, "pattern": "2:4", "shape": [128, 4, 3, 3], "bytes": {"fp32": 1, "file": 1}, "density": 0.5}
    ]}
).encode()  # fmt: skip


@pytest.fixture(scope="module")
def whole(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle that was built; tests copy it."""
    carried = Path(shutil.copy(archive, tmp_path_factory.mktemp("device")))
    build(carried)
    return carried.parent


@pytest.fixture
def device(whole: Path, tmp_path: Path) -> Path:
    """A bundle, and beside it the folder in which it was built."""
    shutil.copytree(whole, tmp_path / "device")
    return tmp_path / "device" / "small.a100.bundle.zip"


def build(source: Path, out: Path | None = None, **options: Any) -> EngineOutcome:
    with open_bundle(source, out, require_here) as bundle:
        return build_bundle(bundle, Events(), **options)


def verify(source: Path) -> Verdict:
    with open_bundle(source) as bundle:
        return verify_bundle(bundle, Events())


def test_a_bundle_is_built_beside_itself(whole: Path) -> None:
    archive, folder = whole / "small.a100.bundle.zip", whole / "small.a100"
    assert {path.name for path in whole.iterdir()} == {archive.name, folder.name}
    with opened_bundle(archive) as opened:
        files = opened.contents.files
    assert {path.name for path in (folder / "bundle").iterdir()} == {INDEX, *files}
    assert {path.name for path in (folder / "build/a100").iterdir()} == {"model.engine", "layers.json", "build.log"}
    told = json.loads((folder / "build/a100/layers.json").read_text())
    assert told["header"]["onnx_sha256"] == files["model.onnx"].sha256
    assert told["header"]["target"] == "a100"
    assert told["header"]["profile"] == {"x": {"min": [1, 4, 6, 6], "opt": [2, 4, 6, 6], "max": [4, 4, 6, 6]}}
    assert told["header"]["sparse_weights"] is False
    assert sorted(RunFolder(folder).records) == ["build/a100", "bundle"]


def test_again_it_is_skipped_and_with_force_the_bytes_are_the_same(device: Path) -> None:
    engine = device.parent / "small.a100/build/a100/model.engine"
    before = engine.read_bytes()
    assert build(device).action == "skipped"
    assert build(device, force=True).reason == "forced"
    assert engine.read_bytes() == before


def test_the_folder_does_where_the_archive_is_gone(device: Path) -> None:
    folder = device.parent / "small.a100"
    device.unlink()
    assert is_bundle(folder)
    assert build(folder).action == "skipped"
    assert verify(folder).verdict == "pass"


def test_out_names_the_folder(carried: Path, tmp_path: Path) -> None:
    with open_bundle(carried, tmp_path / "deep" / "er"):
        assert (tmp_path / "deep/er/bundle/placed.onnx").is_file()
    assert not (tmp_path / "small.a100").exists()


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a.bundle.zip", "a"), ("a.zip", "a"), (".bundle.zip", ".bundle"), ("a.b.orin.bundle.zip", "a.b.orin")],
)
def test_the_default_folder(name: str, folder: str) -> None:
    assert default_folder(Path("/x") / name) == Path("/x") / folder


def test_every_check_passes_but_those_that_need_more(device: Path) -> None:
    verdict = verify(device)
    assert {check.name: check.status for check in verdict.checks} == {
        "digest": "pass", "pattern": "pass", "codes": "pass", "packed": "not checked", "repeatable": "pass",
        "parity.folded": "not checked", "parity.onnx": "pass", "parity.onnx-default": "pass", "parity.placed": "pass",
        "parity.engine": "not checked", "engine.layers": "pass", "agreement": "pass", "metric": "not checked",
        "placement": "pass",
    }  # fmt: skip
    assert verdict["metric"].detail == "a bundle brings no validation data"
    assert "a bundle brings no torch model" in verdict["codes"].detail
    assert verdict["packed"].detail == "a bundle does not carry the packed file"
    assert verdict["digest"].figures["files"] == 10
    assert verdict["engine.layers"].figures == {
        "layers": 2, "held": 2, "lost": [], "not_told": [], "rows": 3, "problems": 0, "not_examined": [],
        "constants": {"found": 2, "looked_for": 2},
    }  # fmt: skip
    written = json.loads((device.parent / "small.a100/verify/a100/verify.json").read_text())
    assert written == verdict.to_json()


def test_what_was_not_built_is_not_checked(carried: Path) -> None:
    verdict = verify(carried)
    assert verdict.verdict == "pass"
    assert verdict["engine.layers"].status == "not checked"
    assert verdict["engine.layers"].detail == "no engine was built here"


def test_another_bundle_in_the_same_folder_is_refused(device: Path) -> None:
    with opened_bundle(device) as opened:
        other = opened.contents.model_copy(update={"name": "other"})
    with_contents(device, other)
    with pytest.raises(ArtifactError, match="holds another bundle than"):
        build(device)
    with open_bundle(device, device.parent / "elsewhere") as bundle:
        assert bundle.contents == other


def test_a_run_folder_and_a_strange_folder_are_left_alone(carried: Path, run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    for folder, told in (("run", "is a run folder"), ("mine", "is not a run folder")):
        with pytest.raises(ArtifactError, match=told):
            build(carried, tmp_path / folder)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_a_damaged_archive_leaves_nothing_behind(carried: Path) -> None:
    with zipfile.ZipFile(carried) as opened:
        inside = opened.getinfo("model.onnx").header_offset + 200
    data = bytearray(carried.read_bytes())
    data[inside] ^= 1
    carried.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"damaged|sha256"):
        build(carried)
    assert [path.name for path in carried.parent.iterdir()] == [carried.name]


def test_a_second_process_waits_its_turn(device: Path) -> None:
    with open_bundle(device), pytest.raises(StorageError, match="Another slope-compile process"), open_bundle(device):
        pass


@pytest.mark.parametrize("name", ["placed.onnx", "model.onnx", "bundle.json", "codes.safetensors"])
def test_an_edited_file_is_not_built_from_and_fails_digest(device: Path, name: str) -> None:
    path = device.parent / "small.a100/bundle" / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ArtifactError, match="edited after the bundle was unpacked"):
        build(device, force=True)
    verdict = verify(device)
    assert verdict["digest"].status == "fail"
    assert f"bundle/{name}" in verdict["digest"].detail


def scaled(path: Path, initializer: str) -> bytes:
    """The model with twice the scale."""
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == initializer]
    tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), initializer))
    return bytes(model.SerializeToString())


def test_other_weights_in_the_placed_file_are_found(carried: Path, run: RunFolder, tmp_path: Path) -> None:
    """The checksums hold: whoever made the bundle put the wrong file into it."""
    (tmp_path / "u").mkdir()
    with open_bundle(carried, tmp_path / "u/x") as bundle:
        wrong = scaled(bundle.files / "placed.onnx", "c.weight.scale")
    changed(carried, "placed.onnx", wrong)
    with pytest.raises(CheckFailedError, match=r"placed\.onnx of the bundle .*c\.weight.*values differ"):
        build(carried)
    verdict = verify(carried)
    assert {check.name for check in verdict.checks if check.status == "fail"} == {"parity.placed", "placement"}


def test_other_weights_than_the_trained_ones_are_found(carried: Path, run: RunFolder) -> None:
    changed(carried, "model.onnx", scaled(run.path / "export/model.onnx", "c.weight.scale"))
    with pytest.raises(CheckFailedError, match="does not hold the trained codes"):
        build(carried)
    failed = {check.name for check in verify(carried).checks if check.status == "fail"}
    assert {"codes", "parity.onnx", "placement"} <= failed


def test_codes_of_another_training_are_found(carried: Path, run: RunFolder, tmp_path: Path) -> None:
    codes = load_codes(run.path / "train/codes.safetensors")
    np.asarray(codes["f.weight"].codes)[0, 0] ^= 1
    save_codes(tmp_path / "other", codes)
    changed(carried, "codes.safetensors", (tmp_path / "other").read_bytes())
    with pytest.raises(CheckFailedError, match=r"f\.weight"):
        build(carried)


@pytest.mark.parametrize(
    ("name", "data"),
    [("placement.json", b'{"places": 1}'), ("placement.json", b"["), ("layers.json", b"{}"),
     ("placement.json", b'{"places": [{"container": "INT4", "placement": "evil", "reason": ""}]}'),
     ("placement.json", b'{"places": [], "more": 1}'), ("layers.json", b'{"layers": [{"name": "c.weight"}]}'),
     ("layers.json", ROW.replace(b"2:4", b"9:x")), ("layers.json", ROW.replace(b"0.5", b"NaN")),
     ("model.onnx", b"x"), ("placed.onnx", b""), ("codes.safetensors", b"xx")],
)  # fmt: skip
def test_files_that_are_something_else_are_refused(carried: Path, name: str, data: bytes) -> None:
    changed(carried, name, data)
    with pytest.raises((ArtifactError, CheckFailedError)):
        build(carried)
    assert verify(carried).verdict == "fail"


@pytest.mark.parametrize(
    ("row", "told"),
    [({"container": "FLOAT", "placement": "sparse-fp16"}, "sparse-fp16 in FLOAT"), ({"container": "EVIL"}, "container"),
     ({"container": "INT4", "placement": "int8"}, "int8 in INT4"),
     ({"container": "INT8", "placement": "float"}, "float in INT8"),
     ({"container": "INT8", "placement": "int8", "block_size": 64}, "only INT4 has blocks"),
     ({"block_size": 2**40}, "block_size")],
)  # fmt: skip
def test_a_container_that_no_placement_has_is_refused(carried: Path, row: dict[str, Any], told: str) -> None:
    with zipfile.ZipFile(carried) as opened:
        places = json.loads(opened.read("placement.json"))
    places["places"][0] |= row
    changed(carried, "placement.json", json.dumps(places).encode())
    with pytest.raises(ArtifactError, match=told):
        build(carried)
    assert verify(carried)["placement"].status == "fail"


def test_a_weight_of_fewer_axes_in_the_placed_file_is_found(carried: Path, run: RunFolder, tmp_path: Path) -> None:
    """A Gemm's matrix in the place of a convolution's weight."""
    with open_bundle(carried, tmp_path / "u") as bundle:
        model = onnx.load(bundle.files / "placed.onnx")
    (tensor,) = [t for t in model.graph.initializer if t.name == "c.weight.codes"]
    (node,) = [n for n in model.graph.node if n.op_type == "Conv"]
    node.op_type = "MatMul"
    del node.attribute[:], node.input[2:]
    channels = tensor.dims[0]
    tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=onnx.TensorProto.INT8, dims=[channels]))
    tensor.raw_data = bytes(channels)
    changed(carried, "placed.onnx", model.SerializeToString())
    with zipfile.ZipFile(carried) as opened:
        places = json.loads(opened.read("placement.json"))
    for place in places["places"]:
        place |= {"container": "INT8", "placement": "int8", "block_size": 0}
    changed(carried, "placement.json", json.dumps(places).encode())
    with pytest.raises(CheckFailedError, match=r"c\.weight.*the file holds 1 axes"):
        build(carried)


def test_fewer_places_than_weights_are_a_failed_check(carried: Path, tmp_path: Path) -> None:
    changed(carried, "placement.json", b'{"places": []}')
    with pytest.raises(CheckFailedError, match="places 0 weights, and the model has 3"):
        build(carried)
    assert verify(carried)["placement"].status == "fail"


def edit_rows(device: Path, edit: Callable[[dict[str, Any]], None]) -> Verdict:
    path = device.parent / "small.a100/build/a100/layers.json"
    told = json.loads(path.read_text())
    for row in told["layers"]:
        if row["name"] == "c.weight":
            edit(row)
    path.write_text(json.dumps(told))
    return verify(device)


def test_a_layer_that_lost_its_placement_fails(device: Path) -> None:
    verdict = edit_rows(device, lambda row: row["engine"].update(held=False, dtype="Float", note="engine holds Float"))
    assert verdict["engine.layers"].status == "fail"
    assert "c.weight: placed as" in verdict["engine.layers"].detail
    assert verdict["engine.layers"].figures["lost"] == ["c.weight"]


def test_a_layer_that_was_placed_otherwise_fails(device: Path) -> None:
    verdict = edit_rows(device, lambda row: row.update(placement="float"))
    assert "built as float" in verdict["engine.layers"].detail


def test_a_layer_list_that_tells_less_than_the_build_log_fails(device: Path) -> None:
    verdict = edit_rows(device, lambda row: row["engine"].update(held=False, dtype=None, note="no constant"))
    assert verdict["engine.layers"].status == "fail"
    assert "c.weight: engine is dtype None" in verdict["engine.layers"].detail
    assert verdict["engine.layers"].figures["not_told"] == ["c.weight"]


def test_an_edited_engine_is_not_loaded(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slope_compile.verify.parity.engine.find_gpu", lambda: SimpleNamespace(sm=(8, 0)))
    monkeypatch.setattr("slope_compile.verify.parity.engine._run_engine", lambda *_: pytest.fail("it was run"))
    (device.parent / "small.a100/build/a100/model.engine").write_bytes(b"evil")
    verdict = verify(device)
    assert verdict["digest"].status == "fail"
    assert "not loaded" in verdict["parity.engine"].detail


def test_the_wrong_machine_is_told_before_anything_else(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither TensorRT nor a GPU is here: the GPU is what cannot be mended."""
    orin = for_orin(carried)
    with pytest.raises(BackendError, match="there is none here; target orin"):
        build(orin)
    assert [path.name for path in carried.parent.iterdir()] == [carried.name]  # not even unpacked
    monkeypatch.setattr(build_module, "find_gpu", lambda: SimpleNamespace(sm=(8, 0)))
    with pytest.raises(BackendError, match="not orin"):
        build(orin)
    monkeypatch.setattr(build_module, "find_gpu", lambda: SimpleNamespace(sm=(8, 7)))
    with pytest.raises(BackendError, match="TensorRT is not installed"):
        build(orin)


def test_another_version_is_refused_with_both(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orin = for_orin(carried)
    monkeypatch.setattr(build_module, "find_gpu", lambda: SimpleNamespace(sm=(8, 7)))
    monkeypatch.setattr(build_module, "choose_backend", lambda name, _: BACKENDS[name])
    monkeypatch.setattr("slope_compile.targets.backends.version_of", lambda _: "10.9.0")
    with pytest.raises(BackendError, match=r"10\.3 to below 10\.8 \(JetPack 6\); 10\.9\.0 is installed here"):
        build(orin)


def for_orin(archive: Path) -> Path:
    with opened_bundle(archive) as opened:
        contents = opened.contents
    orin = contents.model_dump(mode="json", by_alias=True) | {
        "target": "orin",
        "backend": "tensorrt",
        "planned_for": "10.3",
        "versions": [{"system": "JetPack 6", "from": "10.3", "below": "10.8"}],
    }
    orin["build"] |= {"targets": ["orin"], "backend": "tensorrt"}
    return with_contents(archive, Contents.model_validate(orin))
