"""Real engines, built ahead of time with TensorRT-RTX: no GPU is needed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import coded, save, sparse_codes, tensor

import slope_compile.build.engine as engine_module
from slope_compile.build import process
from slope_compile.build.engine import batch_profile, build_engine, build_run
from slope_compile.build.worker import Built, Request
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.events import Events
from slope_compile.recipe import BatchRange, BuildSection
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.gpu import Gpu
from slope_compile.targets.options import Options

BATCH = BatchRange(min=1, opt=2, max=4)
RTX = BACKENDS["tensorrt-rtx"]


def run(model: Path, out: Path, **changed: Any) -> dict[str, Any]:
    """Build in FP32 for an A100 ahead of time; `changed`: keys of a recipe's build, and `target`."""
    target = changed.pop("target", "a100")
    keys: dict[str, Any] = {"backend": "tensorrt-rtx", "batch": BATCH, "precision": "fp32"}
    return build_engine(model, target, BuildSection(**(keys | changed)), out, Events())


@pytest.fixture(scope="module")
def built(net, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    model, out = net(), tmp_path_factory.mktemp("built")
    return model, out, run(model, out)


def test_files(built) -> None:
    _, out, result = built
    assert sorted(p.name for p in out.iterdir()) == [
        "build.log",
        "layers.json",
        "model.engine",
        "placed.onnx",
    ]  # RTX has no timing cache
    assert json.loads((out / "layers.json").read_text()) == result


def test_header(built) -> None:
    model, out, result = built
    engine = (out / "model.engine").read_bytes()
    header = dict(result["header"])
    assert header.pop("version").startswith("1.")
    assert header == {
        "backend": "tensorrt-rtx",
        "target": "a100",
        "sm": "8.0",
        "profile": {"x": {"min": [1, 4, 6, 6], "opt": [2, 4, 6, 6], "max": [4, 4, 6, 6]}},
        "onnx_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "engine_sha256": hashlib.sha256(engine).hexdigest(),
        "engine_bytes": len(engine),
        "sparse_weights": False,  # 2:4, and its activation is in float: no layer is placed for sparse kernels
        "precision": "fp32",
        "precision_reason": "asked for",
        "options": Options().as_dict(),
        "notes": ["TensorRT-RTX builds for a100, but its support matrix does not name that GPU"],
    }


def test_rows_say_what_the_engine_holds(built) -> None:
    conv, gemm, head = built[2]["layers"]
    assert (conv["name"], conv["placement"], conv["pattern"], conv["bits"]) == ("c.weight", "int4-storage", "2:4", 4)
    assert (conv["engine"]["dtype"], conv["engine"]["bytes"], conv["engine"]["held"]) == (
        "Int4",
        128 * 4 * 9 // 2,
        True,
    )
    assert conv["engine"]["note"] is None
    assert conv["engine"]["layer_type"] == "kgen"
    assert conv["engine"]["computed_by"] != conv["engine"]["layer"]  # dequantized apart, multiplied elsewhere
    assert conv["engine"]["sparse_chosen"] is None
    assert (gemm["name"], gemm["placement"], gemm["pattern"]) == ("f.weight", "int4-weight", None)
    assert (gemm["engine"]["dtype"], gemm["engine"]["bytes"], gemm["engine"]["held"]) == ("Int4", 512, True)
    assert (head["name"], head["placement"], head["bits"]) == ("h.weight", "float", None)
    assert (head["engine"]["dtype"], head["engine"]["held"]) == ("Float", True)
    assert head["engine"]["bytes"] >= 96  # padded: 3 is no size for a GEMM kernel


def test_summary(built) -> None:
    summary = built[2]["summary"]
    weight_bytes = 2304 + 512 + built[2]["layers"][2]["engine"]["bytes"]
    assert (summary["coded"], summary["held"], summary["not_held"]) == (2, 2, [])
    assert (summary["types"], summary["weight_bytes"]) == ({"Float": 1, "Int4": 2}, weight_bytes)
    assert summary["int8"] == {"declared": 0, "multiplied": 0}


def test_log_is_verbose_and_nothing_is_printed(net, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(net(), tmp_path)
    assert capfd.readouterr() == ("", "")
    log = (tmp_path / "build.log").read_text()
    assert "VERBOSE: Layers:" in log
    assert "SPARSE_WEIGHTS" not in log
    assert "STRONGLY_TYPED" in log


def test_two_processes_make_the_same_bytes(built, tmp_path: Path) -> None:
    model, out, _ = built
    elsewhere = tmp_path / "other" / "name.onnx"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(model.read_bytes())
    run(elsewhere, tmp_path)
    for name in ("model.engine", "layers.json"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("built_bytes", "taken", "builds"),
    [
        ([b"a", b"a"], b"a", 2),
        ([b"x", b"a", b"a"], b"a", 3),
        ([b"a", b"x", b"a"], b"a", 3),
        ([b"c", b"b", b"d"], b"d", 3),
    ],
)
def test_bytes_that_two_builds_agree_on_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built_bytes: list[bytes], taken: bytes, builds: int
) -> None:
    left = list(built_bytes)
    monkeypatch.setattr(process, "run_worker", lambda *_: Built(left.pop(0), b"", "1"))
    assert process.build_repeated(Any, RTX, tmp_path, tmp_path / "log").engine == taken  # type: ignore[arg-type]
    assert len(built_bytes) - len(left) == builds
    left[:] = [b"measured", b"other"]
    made = process.build_repeated(Any, BACKENDS["tensorrt"], tmp_path, tmp_path / "log")  # type: ignore[arg-type]
    assert made.engine == b"measured"
    assert len(left) == 1


def test_export_rows_are_kept(net, tmp_path: Path) -> None:
    model, export, out = net(), tmp_path / "export", tmp_path / "out"
    export.mkdir()
    out.mkdir()
    model.replace(export / "model.onnx")
    rows = [
        {"name": "h.weight", "reason": "left alone by the policy", "placement": "float", "bits": None, "op": "Gemm"},
        {"name": "c.weight", "reason": "exported", "placement": "int8-weight", "bits": 3, "pattern": "2:4", "own": [1]},
        {"name": "gone.weight", "reason": "r", "placement": "float", "bits": None},
    ]
    (export / "layers.json").write_text(json.dumps({"layers": rows}))
    build_run(BuildSection(batch=BATCH, backend="tensorrt-rtx", precision="fp32"), "rtx-ada", export, out, Events())
    result = json.loads((out / "layers.json").read_text())
    assert result["header"]["sm"] == "8.9"
    head, conv, gone, gemm = result["layers"]
    assert head["reason"] == "left alone by the policy"
    assert (conv["bits"], conv["own"], conv["placement"], conv["container"]) == (3, [1], "int4-storage", "INT4")
    assert "INT4 codes" in conv["reason"]
    assert (gone["engine"]["held"], gone["engine"]["note"]) == (False, "the ONNX file has no such weight")
    assert gemm["name"] == "f.weight"


@pytest.mark.parametrize("text", ["{", '{"layers": [{}]}', '{"layers": 3}', "[]"])
def test_damaged_export(tmp_path: Path, text: str) -> None:
    (tmp_path / "layers.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"layers\.json"):
        build_run(BuildSection(), "a100", tmp_path, tmp_path, Events())


def test_2_bit_codes_are_built_as_int4(net, tmp_path: Path) -> None:
    result = run(net("INT2"), tmp_path)
    conv = result["layers"][0]
    assert (conv["bits"], conv["container"], conv["bytes"]) == (2, "INT4", {"fp32": 18432, "file": 1152 + 512})
    assert "INT2 codes travel in a wider type: TensorRT-RTX cannot import them" in result["header"]["notes"]
    assert (conv["engine"]["dtype"], conv["engine"]["held"]) == ("Int4", True)


def test_fixed_batch_needs_no_profile(net, tmp_path: Path) -> None:
    assert run(net(shape=(3, 4, 6, 6)), tmp_path)["header"]["profile"] == {}


def test_refused_node_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser's own words, for what no rule of the lint knows."""
    monkeypatch.setattr(engine_module, "refuse_violations", lambda *_: None)
    info = [helper.make_tensor_value_info(n, t, None if n == "y" else ["b", 4]) for n, t in (("x", 1), ("y", 7))]
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"], name="nz")], "g", info[:1], info[1:])
    model = tmp_path / "m.onnx"
    model.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )
    with pytest.raises(BackendError, match=r"node 'nz' \(NonZero\).*NonZero plugin") as caught:
        run(model, tmp_path)
    assert "cudaError" not in str(caught.value)
    assert not (tmp_path / "model.engine").exists()


def test_failing_build_tells_the_builder_s_reason(net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that the graph cannot have passes the parser and fails the builder."""
    model = net(shape=(3, 4, 6, 6))
    monkeypatch.setattr(engine_module, "batch_profile", lambda graph, batch: {"x": ([1, 4, 6, 6],) * 3})
    with pytest.raises(
        BackendError, match=r"could not build the engine: .*static dimensions that don't match"
    ) as caught:
        run(model, tmp_path)
    assert "/_src/" not in str(caught.value)


def test_a_builder_that_dies_fails_the_build_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_WORKER", "import os, sys; sys.stderr.write('so far\\n'); os.abort()")
    with pytest.raises(BackendError, match=r"died \(SIGABRT\).*so far"):
        process.run_worker(Request("tensorrt-rtx", "m", (8, 0), {}, False), RTX, tmp_path, tmp_path / "log")


def test_a_bug_in_the_worker_is_no_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_WORKER", "raise ValueError('ours')")
    with pytest.raises(RuntimeError, match="ValueError: ours"):
        process.run_worker(Request("tensorrt-rtx", "m", (8, 0), {}, False), RTX, tmp_path, tmp_path / "log")


def test_unknown_target_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="Did you mean 'a100'"):
        run(tmp_path / "missing.onnx", tmp_path, target="a10")


def test_building_needs_no_torch(net, tmp_path: Path) -> None:
    """In a process where importing torch fails, and so in the builder that it starts."""
    (tmp_path / "block" / "torch").mkdir(parents=True)
    (tmp_path / "block" / "torch" / "__init__.py").write_text("raise ImportError('torch is blocked')")
    code = (
        "import sys; from pathlib import Path; from slope_compile.build.engine import build_engine\n"
        "from slope_compile.events import Events; from slope_compile.recipe import BuildSection\n"
        "section = BuildSection(backend='tensorrt-rtx', precision='fp32')\n"
        "build_engine(Path(sys.argv[1]), 'a100', section, Path(sys.argv[2]), Events())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "block"), *sys.path])}
    command = [sys.executable, "-c", code, str(net()), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "model.engine").stat().st_size > 0


def test_settings_reach_the_builder(net, tmp_path: Path) -> None:
    header = run(net(), tmp_path, workspace_gib=1.5, optimization_level=1)["header"]
    assert header["options"] == Options(workspace=3 * 2**29, optimization_level=1).as_dict()
    log = (tmp_path / "build.log").read_text()
    assert "optimization level 1" in log
    assert "WORKSPACE: 1536.00 MiB" in log


def test_refused_before_any_work(tmp_path: Path) -> None:
    for keys, what in (
        ({"target": "orin"}, "no code generator for SM 8.7"),
        ({"timing_cache": "t.cache"}, "TensorRT-RTX does not take it"),
        ({"workspace_gib": 81.0}, "has 80 GiB of memory"),
        ({"strip": True}, "on a GPU only"),
    ):
        with pytest.raises(BackendError, match=what):
            run(tmp_path / "missing.onnx", tmp_path, **keys)
    assert not list(tmp_path.iterdir())


def test_the_timing_cache_goes_from_build_to_build(net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with TensorRT on an A100, but for the build itself."""
    began_with = []

    def build(request: Request, backend: Any, folder: Path, log: Path, cache: bytes) -> Built:
        began_with.append(cache)
        log.write_text("")
        return Built(b"engine", b"measured " + cache, "10.3.0")

    monkeypatch.setattr(engine_module, "build_repeated", build)
    monkeypatch.setattr(engine_module, "find_gpu", lambda: Gpu("A100", (8, 0)))
    monkeypatch.setattr("slope_compile.targets.backends.Backend.installed", lambda self: True)
    monkeypatch.setattr("slope_compile.targets.backends.Backend.installed_version", lambda self: "10.3.0")
    section, model = BuildSection(backend="tensorrt", precision="fp32"), net()
    first, second = tmp_path / "first", tmp_path / "second"
    for out, last in ((first, None), (second, first)):
        out.mkdir()
        build_engine(model, "a100", section, out, Events(), last=last)
    assert began_with == [b"", b"measured "]
    assert (second / "timing.cache").read_bytes() == b"measured measured "
    asked = section.model_copy(update={"timing_cache": str(first / "timing.cache")})
    (first / "timing.cache").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"its sha256 is not the one in timing\.json"):
        build_engine(model, "a100", asked, second, Events())


@pytest.mark.parametrize(("version", "flag"), [("10.3.0", True), ("11.4.0", False)])
def test_tensorrt_s_own_path(net, tmp_path: Path, version: str, flag: bool) -> None:
    """TensorRT-RTX stands in for TensorRT, under its name and version: same calls, other arguments, a timing cache."""
    code = f"""
import sys, tensorrt_rtx
sys.modules["tensorrt"] = tensorrt_rtx
tensorrt_rtx.__version__ = {version!r}
from slope_compile.build import worker
from slope_compile.targets.backends import BACKENDS, select_in_polygraphy
trt = select_in_polygraphy(BACKENDS["tensorrt"])
from polygraphy.backend.trt import loader
asked = {{}}
create = loader.CreateNetwork.__init__
loader.CreateNetwork.__init__ = lambda self, **arguments: (asked.update(arguments), create(self, **arguments))[1]
request = worker.Request("tensorrt", sys.argv[1], (8, 0), {{"x": ([1, 4, 6, 6], [2, 4, 6, 6], [4, 4, 6, 6])}}, True)
worker.inspect = lambda *_: "asked"  # TensorRT-RTX loads nothing without a GPU
built = worker.build(request, BACKENDS["tensorrt"], trt, b"")
assert built.engine and built.cache and built.version == {version!r} and built.inspector == "asked"
assert asked == {{"strongly_typed": {flag}}}, asked
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, str(net("INT8"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SPARSE_WEIGHTS" in done.stdout + done.stderr
    assert "TF32" in done.stdout + done.stderr


def graph_with(**inputs: Any) -> Any:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])]
    return helper.make_graph([], "g", infos, infos[:1], weights)


def test_profile() -> None:
    graph = graph_with(x=["n", 3, 8], ids=[None], fixed=[2, 5], scalar=[], w=[1])
    assert batch_profile(graph, (1, 2, 4)) == {"x": ([1, 3, 8], [2, 3, 8], [4, 3, 8]), "ids": ([1], [2], [4])}


def test_profile_refuses_other_dynamic_axes() -> None:
    with pytest.raises(BackendError, match=r"Axis 2 \('width'\) of the input 'x' is dynamic"):
        batch_profile(graph_with(x=["n", 3, "width"]), (1, 2, 4))
    with pytest.raises(BackendError, match="input 'x' of the model has no shape"):
        batch_profile(graph_with(x=None), (1, 2, 4))
    for size in (-1, 0, 2**31):
        with pytest.raises(BackendError, match=f"Axis 1 of the input 'x' has {size} elements"):
            batch_profile(graph_with(x=["n", size]), (1, 2, 4))


@pytest.mark.parametrize("high", [127, 15])
def test_int8_products_are_read_from_the_layer_list(tmp_path: Path, high: int) -> None:
    """conv (2:4) -> relu -> conv -> mean -> Gemm, each reading a quantized activation but for the last; INT4 codes."""
    tensors, nodes = [], []

    def quantize(value: str, name: str) -> str:
        tensors.extend([tensor(f"{name}.scale", np.float32(0.1), "FLOAT"), tensor(f"{name}.zp", np.int8(0), "INT8")])
        for end, level in (("min", 0), ("max", high)):
            tensors.append(tensor(f"{name}.{end}", np.float32(level * 0.1), "FLOAT"))
        ends = [f"{name}.min", f"{name}.max"]
        nodes.append(helper.make_node("Clip", [value, *ends], [f"{name}.c"], name=f"{name}.clip"))
        scale = [f"{name}.scale", f"{name}.zp"]
        nodes.append(helper.make_node("QuantizeLinear", [f"{name}.c", *scale], [f"{name}.i"], name=f"{name}.q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.i", *scale], [f"{name}.v"], name=f"{name}.dq"))
        return f"{name}.v"

    rng = np.random.default_rng(0)
    dense = rng.integers(1, 8, (16, 16, 3, 3))
    for name, codes, axis in (("a.weight", sparse_codes((16, 4, 3, 3), 1, 7), 0), ("b.weight", dense, 0)):
        made, node = coded(name, codes, np.full(16, 0.5), "INT4", axis=axis)
        tensors.extend(made)
        nodes.append(node)
    made, node = coded("f.weight", rng.integers(1, 8, (8, 16)), np.full(8, 0.5), "INT8", axis=0)
    tensors.extend(made)
    nodes.append(node)
    nodes.append(helper.make_node("Conv", [quantize("x", "one"), "a.weight"], ["a"], name="a", pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node("Relu", ["a"], ["r"], name="r"))
    nodes.append(helper.make_node("Conv", [quantize("r", "two"), "b.weight"], ["b"], name="b", pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node("GlobalAveragePool", ["b"], ["p"], name="p"))
    nodes.append(helper.make_node("Flatten", ["p"], ["v"], name="v"))
    nodes.append(helper.make_node("Gemm", ["v", "f.weight"], ["y"], name="f", transB=1))
    result = run(save(tmp_path / "m.onnx", nodes, tensors, ["batch", 4, 6, 6], "y"), tmp_path)
    found = {row["name"]: (row["placement"], row["engine"]["int8_product"]) for row in result["layers"]}
    assert (found["a.weight"], found["b.weight"]) == (("sparse-int8", True), ("int8", True))
    assert result["header"]["sparse_weights"] and "SPARSE_WEIGHTS" in (tmp_path / "build.log").read_text()
    assert found["f.weight"][1] is False  # its activation is in float
    assert all(row["engine"]["held"] for row in result["layers"][:2])
    assert result["summary"]["int8"] == {"declared": 2, "multiplied": 2}


@pytest.mark.parametrize(("dtype", "scale", "rule"), [(np.uint8, 0.1, "uint8"), (np.int8, np.inf, "scale-positive")])
def test_what_would_compute_something_else_is_refused(tmp_path: Path, dtype: Any, scale: float, rule: str) -> None:
    """TensorRT-RTX builds both: UINT8 as INT8, clipped at 127, and an infinite step unseen."""
    w, dq = coded("w.weight", np.ones((8, 8)), np.full(8, 0.5), "INT8", axis=1)
    tensors = [*w, tensor("s", np.float32(scale), "FLOAT"), numpy_helper.from_array(np.asarray(0, dtype), "z")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["v"], name="dq"),
        dq,
        helper.make_node("MatMul", ["v", "w.weight"], ["y"], name="m"),
    ]
    model = save(tmp_path / "m.onnx", nodes, tensors, ["n", 8], "y")
    with pytest.raises(ArtifactError, match=rf"m\.onnx: {rule}: q: .*slope-compile inspect .* --target a100"):
        run(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx"}
