from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from verify_twins import CHANNELS, SIDE, make_twin

from slope_compile.artifacts import FileDigest
from slope_compile.qdq.reader import coded_weights
from slope_compile.targets.gpu import Gpu, find_gpu
from slope_compile.targets.options import Options
from slope_compile.verify.chain.golden import read_golden
from slope_compile.verify.chain.runners import reference_session
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity import engine as engine_module
from slope_compile.verify.parity.engine import EngineUnderTest, check_engine, engine_under_test, joined, split
from slope_compile.verify.parity.outputs import named
from slope_compile.verify.parity.tolerance import tolerance_of
from slope_compile.verify.verdict import Check, NotCheckedError, Once, attempt

A100 = Gpu("NVIDIA A100", (8, 0))
# An engine that is an ONNX file, run by a process that speaks the worker's protocol.
STAND_IN = """
import json, sys
import onnxruntime as ort
from safetensors.numpy import load, save
request = json.loads(sys.stdin.buffer.readline())
inputs = load(sys.stdin.buffer.read())
session = ort.InferenceSession(request["engine"], providers=["CPUExecutionProvider"])
outputs = {k.replace("input", "output"): session.run(None, {"input": v})[0] * FACTOR for k, v in inputs.items()}
assert len(inputs) == request["feeds"] and max(len(v) for v in inputs.values()) <= 4
sys.stdout.buffer.write(b"{}\\n" + save(outputs))
"""


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Check]:
    """A check of an 'engine' which is the ONNX file itself, on feeds of 10 samples; the profile allows 4 at once."""
    onnx = make_twin().write(tmp_path / "model.onnx")
    (tmp_path / "model.engine").write_bytes(onnx.read_bytes())
    weights = coded_weights(onnx)
    inputs = np.random.default_rng(0).standard_normal((10, CHANNELS, SIDE, SIDE), dtype=np.float32)

    def run(
        trusted: bool = True,
        feeds: Any = None,
        golden: Any = None,
        absent: bool = False,
        sha256: str | None = None,
        **facts: Any,
    ) -> Check:
        header = {
            "backend": "tensorrt", "version": "10.3.0", "target": "a100", "sm": "8.0",
            "profile": {"input": {"min": [1, 8, 6, 6], "opt": [4, 8, 6, 6], "max": [4, 8, 6, 6]}},
            "onnx_sha256": FileDigest.of(onnx).sha256, "engine_sha256": "0", "engine_bytes": 1, "sparse_weights": True,
            "options": Options().as_dict(),
        }  # fmt: skip
        layers = tmp_path / "layers.json"
        layers.write_text(json.dumps({"header": header | facts, "layers": []}))
        under_test = EngineUnderTest(tmp_path / "model.engine", layers, trusted, sha256)
        given = [{"input": inputs}] if feeds is None else feeds
        session, tolerance = Once(lambda: reference_session(onnx)), Once(lambda: tolerance_of(weights, ten_bits=True))
        if absent:
            session = Once(no_onnxruntime)
        return attempt(
            "parity.engine", lambda: check_engine(under_test, onnx, session, tolerance, lambda: given, golden)
        )

    return run


def no_onnxruntime() -> Any:
    raise NotCheckedError("onnxruntime is not installed")


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "find_gpu", lambda: A100)
    monkeypatch.setattr(engine_module, "check_header", lambda header, gpu: None)


def test_without_an_engine_it_is_not_checked() -> None:
    given = attempt("parity.engine", lambda: check_engine(None, Path("m.onnx"), Once(list), Once(list), list))
    assert (given.status, given.detail) == ("not checked", "no engine was given")


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_reason_names_what_the_engine_was_built_for(check: Callable[..., Check]) -> None:
    found = check()
    assert found.status == "not checked"
    assert "SM 8.0 (a100)" in found.detail and "no NVIDIA GPU" in found.detail


def test_another_gpu_or_version_is_not_checked(check: Callable[..., Check], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "find_gpu", lambda: Gpu("RTX 4090", (8, 9)))
    monkeypatch.setattr("slope_compile.targets.backends.Backend.installed", lambda self: False)
    assert check().status == "not checked"


def test_an_untrusted_engine_is_never_run(
    check: Callable[..., Check], with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_run_engine", lambda *_: pytest.fail("an untrusted engine was run"))
    found = check(trusted=False)
    assert found.status == "fail"
    assert "refused" in found.detail and "sha256" in found.detail and "--trust-engine" in found.detail


def test_trust_is_judged_before_the_gpu_is_looked_for(
    check: Callable[..., Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "find_gpu", lambda: pytest.fail("it was looked for"))
    assert check(trusted=False, onnx_sha256="0" * 64).figures == {"refused": True}


def test_an_engine_of_another_model_fails_without_a_gpu(check: Callable[..., Check]) -> None:
    found = check(onnx_sha256="0" * 64)
    assert found.status == "fail"
    assert "another file" in found.detail


def test_a_missing_engine_or_layer_list_fails(check: Callable[..., Check], tmp_path: Path) -> None:
    assert check().status == "not checked"
    none = Once(list)
    for path, layers in (("gone.engine", "layers.json"), ("model.engine", "gone.json")):
        under_test = EngineUnderTest(tmp_path / path, tmp_path / layers, True, None)
        found = attempt("parity.engine", lambda: check_engine(under_test, tmp_path / "model.onnx", none, none, list))  # noqa: B023
        assert found.status == "fail"
        assert "gone" in found.detail


@pytest.mark.parametrize(("factor", "status"), [("1", "pass"), ("1.5", "fail")])
def test_the_engines_outputs_are_compared_in_batches_that_its_profile_allows(
    factor: str, status: str, check: Callable[..., Check], with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine_module,
        "_WORKER",
        STAND_IN.replace("FACTOR", f"np.float32({factor})").replace("import json", "import json, numpy as np", 1),
    )
    found = check()
    assert found.status == status, found.detail
    if factor == "1":
        assert found.figures["relative"] <= found.figures["tolerance"]


@pytest.mark.parametrize(("factor", "status"), [("1", "pass"), ("1.5", "fail")])
def test_where_onnxruntime_is_absent_the_golden_outputs_stand_in_for_it(
    factor: str,
    status: str,
    check: Callable[..., Check],
    with_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = STAND_IN.replace("FACTOR", f"np.float32({factor})").replace("import json", "import json, numpy as np", 1)
    monkeypatch.setattr(engine_module, "_WORKER", worker)
    twin = make_twin()
    twin.golden(tmp_path / "golden.safetensors")
    golden = Once(lambda: named(read_golden(tmp_path / "golden.safetensors"), tmp_path / "model.onnx"))
    found = check(absent=True, golden=golden)
    assert found.status == status, found.detail
    assert "of the golden outputs (onnxruntime is not installed)" in found.detail
    assert check(absent=True).detail == "onnxruntime is not installed"


@pytest.mark.parametrize("absent", [False, True], ids=["onnxruntime", "golden"])
def test_a_profile_of_one_batch_size_gets_whole_batches(
    absent: bool, check: Callable[..., Check], with_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feed's 10 samples and the golden ones are no multiple of 6."""
    worker = STAND_IN.replace(" * FACTOR", "").replace("max(len(v) for v in inputs.values()) <= 4", "SIX")
    monkeypatch.setattr(engine_module, "_WORKER", worker.replace("SIX", "{len(v) for v in inputs.values()} == {6}"))
    make_twin().golden(tmp_path / "golden.safetensors")
    golden = Once(lambda: named(read_golden(tmp_path / "golden.safetensors"), tmp_path / "model.onnx"))
    shape = [6, 8, 6, 6]
    found = check(absent=absent, golden=golden, profile={"input": {"min": shape, "opt": shape, "max": shape}})
    assert found.status == "pass", found.detail


@pytest.mark.parametrize(
    ("worker", "status", "words"),
    [
        ("import sys; sys.stderr.write('out of memory'); sys.exit(9)", "fail", "out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "fail", "exit code -11"),
        ("""print('{"problem": "it does not load"}')""", "fail", "it does not load"),
        ("""print('{"not_checked": "no libcudart"}')""", "not checked", "no libcudart"),
    ],
)
def test_what_becomes_of_the_process_that_runs_it(
    worker: str, status: str, words: str, check: Callable[..., Check], with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_WORKER", worker)
    found = check()
    assert found.status == status
    assert words in found.detail


def test_the_bytes_that_are_loaded_are_those_that_were_trusted(
    check: Callable[..., Check], with_gpu: None, tmp_path: Path
) -> None:
    """The worker itself hashes what it read: the file is another one since its digest was compared."""
    trusted = FileDigest.of(tmp_path / "model.engine").sha256
    (tmp_path / "model.engine").write_bytes(b"swapped")
    found = check(sha256=trusted)
    assert found.status == "fail"
    assert "model.engine is refused, not loaded: it changed while it was verified" in found.detail
    assert "refused" not in check(sha256=FileDigest.of(tmp_path / "model.engine").sha256).detail
    assert "refused" not in check(sha256=None).detail  # --trust-engine


def test_an_engine_is_trusted_by_its_manifest_or_by_the_user(tmp_path: Path) -> None:
    path, layers = tmp_path / "m.engine", tmp_path / "layers.json"
    path.write_bytes(b"x")
    own = FileDigest.of(path)
    other = FileDigest(own.size, "0" * 64)
    for listed, trust, trusted, sha256 in [
        (own, False, True, own.sha256), (own, True, True, own.sha256), (other, False, False, None),
        (None, False, False, None), (other, True, True, None), (None, True, True, None),
    ]:  # fmt: skip
        assert engine_under_test(path, layers, listed, trust) == EngineUnderTest(path, layers, trusted, sha256)
    path.unlink()
    assert not engine_under_test(path, layers, own, False).trusted


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ({"input": {"min": [10**9, 8, 6, 6], "max": [10**9, 8, 6, 6]}}, "takes 1000000000 to 1000000000 samples"),
        ({"input": {"min": [4, 8, 6, 6], "max": [2, 8, 6, 6]}}, "takes 4 to 2 samples"),
        ({"input": {"min": [0, 8, 6, 6], "max": [0, 8, 6, 6]}}, "takes 0 to 0 samples"),
        ({"input": {"min": [], "max": [1]}}, "has the profile"),
        ([1], "has the profile"),
    ],
)
def test_a_profile_that_no_engine_has_fails_before_anything_is_made_of_it(
    profile: Any, told: str, check: Callable[..., Check], with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "split", lambda *_: pytest.fail("it was cut"))
    found = check(profile=profile)
    assert found.status == "fail"
    assert told in found.detail


def test_without_inputs_it_is_not_checked(check: Callable[..., Check], with_gpu: None) -> None:
    assert check(feeds=[]).status == "not checked"


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None or find_gpu() is not None, reason="for TensorRT-RTX without a GPU"
)
def test_the_worker_itself_reports_an_engine_that_does_not_load(check: Callable[..., Check], with_gpu: None) -> None:
    found = check(backend="tensorrt-rtx")
    assert found.status in ("fail", "not checked")
    assert "load" in found.detail or "CUDA" in found.detail


def test_split_keeps_every_sample_in_order() -> None:
    feed = {"a": np.arange(7), "b": np.arange(14).reshape(7, 2)}
    parts = split(feed, 1, 3)
    assert [len(part["a"]) for part in parts] == [3, 3, 1]
    for name, array in feed.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    assert len(split(feed, 1, None)) == 1


@pytest.mark.parametrize(
    ("count", "smallest", "largest", "rows"),
    [
        (16, 6, 6, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 1]]),
        (5, 2, 4, [[0, 1, 2, 3], [4, 0]]), (4, 2, 4, [[0, 1, 2, 3]]), (2, 5, 8, [[0, 1, 0, 1, 0]]),
        (2, 3, None, [[0, 1, 0]]),
    ],
)  # fmt: skip
def test_split_fills_up_what_is_less_than_the_profile_allows(
    count: int, smallest: int, largest: int | None, rows: list[list[int]]
) -> None:
    feed = {"a": np.arange(count), "b": np.arange(2 * count).reshape(count, 2)}
    parts = split(feed, smallest, largest)
    assert [part["a"].tolist() for part in parts] == rows
    for part in parts:
        np.testing.assert_array_equal(part["b"], feed["b"][part["a"]])


@pytest.mark.parametrize(("smallest", "largest"), [(1, 3), (6, 6), (2, 4), (5, 8), (3, None)])
def test_joined_is_the_inverse_of_split(smallest: int, largest: int | None) -> None:
    feeds = [{"a": np.arange(count)} for count in (7, 2, 16)]
    parts = [part for feed in feeds for part in split(feed, smallest, largest)]
    whole = joined(parts, feeds, smallest, largest)
    assert [feed["a"].tolist() for feed in whole] == [list(range(count)) for count in (7, 2, 16)]
    assert len(joined(parts[: len(split(feeds[0], smallest, largest))], feeds, smallest, largest)) == 1


@pytest.mark.parametrize(("factor", "status"), [("1", "pass"), ("1.5", "fail")])
def test_an_engine_that_ran_is_the_end_of_the_chain(
    factor: str,
    status: str,
    check: Callable[..., Check],
    with_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = STAND_IN.replace("FACTOR", f"np.float32({factor})").replace("import json", "import json, numpy as np", 1)
    monkeypatch.setattr(engine_module, "_WORKER", worker)
    check()  # writes the layer list
    engine = EngineUnderTest(tmp_path / "model.engine", tmp_path / "layers.json", True, None)
    twin = make_twin()
    golden = twin.golden(tmp_path / "g.safetensors", samples=10)
    verdict = verify_model(
        tmp_path / "model.onnx", model=twin.model(), golden=golden, engine=engine, out=tmp_path / "out"
    )
    assert verdict["parity.engine"].status == verdict["agreement"].status == status
    figures = verdict["agreement"].figures
    assert (figures["from"], figures["to"], figures["judged"]) == ("trained", "engine", True)
    assert figures["tolerance"] == pytest.approx(
        verdict["parity.onnx"].figures["tolerance"] + verdict["parity.engine"].figures["tolerance"], rel=0.01
    )
    kept = RunResults.load(str(tmp_path / "out/chain/engine.json"))["engine"][0]["output"]
    onnx = RunResults.load(str(tmp_path / "out/chain/onnx.json"))["onnx"][0]["output"]
    np.testing.assert_allclose(kept, onnx * float(factor), rtol=1e-4, atol=1e-5)
