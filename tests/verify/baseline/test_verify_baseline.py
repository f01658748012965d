"""A run against its baseline: better never fails, worse than the budget does, what is not known is not checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared_runs import ENGINE, engine_row, layers_json, make_run

from slope_compile.artifacts import FileDigest, RunFolder
from slope_compile.recipe import BaselineSection
from slope_compile.verify.baseline.check import check_baseline
from slope_compile.verify.baseline.runs import Compared
from slope_compile.verify.verdict import Check

UNKNOWN = {"chosen": None, "chosen_by": "not checked: TensorRT-RTX chooses kernels at run time"}
METRIC = Check("metric", "not checked", "no data")
Make = Callable[..., RunFolder]


@pytest.fixture
def make(net: Callable[..., Path], tmp_path: Path) -> Make:
    def run(name: str, **given: Any) -> RunFolder:
        return make_run(tmp_path / name, net, **given)

    return run


def judge(ours: RunFolder, theirs: RunFolder, metric: Check = METRIC, **budgets: Any) -> dict[str, Check]:
    compared = Compared(ours, theirs, "a100", BaselineSection(**budgets), {"metric": metric})
    return {check.name: check for check in check_baseline(compared)}


def bench(run: RunFolder, p50: float, gpu: str = "NVIDIA A100", batch: int = 4, **more: Any) -> RunFolder:
    told = {
        "gpu": {"name": gpu}, "batch": batch, "shapes": {"x": [batch, 4, 6, 6]},
        "engine": {"latency_ms": {"p50": p50}}, "engine_sha256": FileDigest.of(run.path / ENGINE).sha256,
    }  # fmt: skip
    (run.fresh_partial("bench/a100") / "bench.json").write_text(json.dumps(told | more))
    run.commit("bench/a100", {}, {})
    return run


def onnx_metric(value: float, status: Any = "pass") -> Check:
    return Check("metric", status, "told", {"onnx": value})


def test_equal_runs_pass_with_no_budget_at_all(make: Make) -> None:
    ours, theirs = bench(make("ours"), 1.0), bench(make("theirs"), 1.0)
    found = judge(ours, theirs, size=0, metric_drop=0, latency=0)
    assert {check.status for check in found.values()} == {"pass"}


def test_better_never_fails(make: Make) -> None:
    rows = [engine_row("c.weight", engine={"sparse_chosen": False}), engine_row("f.weight", placement="float")]
    theirs = bench(make("theirs", engine=b"x" * 100, accuracy=0.1, built={"layers": rows}), 9.0)
    found = judge(bench(make("ours", accuracy=0.9), 1.0), theirs, size=0, metric_drop=0, latency=0)
    assert {check.status for check in found.values()} == {"pass"}
    assert found["baseline.sparse"].figures["gained"] == ["c.weight"]


@pytest.mark.parametrize(("p50", "status"), [(1.04, "pass"), (1.06, "fail"), (0.1, "pass")])
def test_latency(make: Make, p50: float, status: str) -> None:
    found = judge(bench(make("ours"), p50), bench(make("theirs"), 1.0))["baseline.latency"]
    assert found.status == status
    assert found.figures["p50_ms"] == p50


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"gpu": "NVIDIA L4"}, "the gpu is not the same: NVIDIA L4, of the baseline NVIDIA A100"),
        ({"batch": 8}, "the batch is not the same"),
        ({"engine_sha256": "0"}, "this run was measured with another engine than it has now"),
    ],
)
def test_other_latencies_are_not_compared(make: Make, ours: Any, said: str) -> None:
    found = judge(bench(make("ours"), 9.0, **ours), bench(make("theirs"), 1.0))["baseline.latency"]
    assert (found.status, found.detail.startswith(said)) == ("not checked", True)


def test_without_bench_latency_is_not_checked(make: Make) -> None:
    found = judge(make("ours"), bench(make("theirs"), 1.0))["baseline.latency"]
    assert (found.status, found.detail) == ("not checked", "this run has no finished 'bench/a100'")


@pytest.mark.parametrize("engine", [None, {"latency_ms": {"p50": "fast"}}, {"latency_ms": {"p50": 0}}])
def test_a_bench_that_is_none_of_ours_fails(make: Make, engine: Any) -> None:
    found = judge(bench(make("ours"), 1.0, engine=engine), bench(make("theirs"), 1.0))["baseline.latency"]
    assert (found.status, "bench.json of this run" in found.detail) == ("fail", True)


def test_where_kernels_are_not_known_they_are_not_compared(make: Make, net: Callable[..., Path]) -> None:
    summary = layers_json(net(), b"plan")["summary"]
    unknown = make("unknown", built={"summary": {**summary, "sparse": {**summary["sparse"], **UNKNOWN}}})
    known = make("known")
    for ours, theirs, whose in ((unknown, known, "this run"), (known, unknown, "the baseline")):
        found = judge(ours, theirs)["baseline.sparse"]
        assert found.status == "not checked"
        assert found.detail == f"the kernels of {whose} are not known: TensorRT-RTX chooses kernels at run time"
    old = make("old", built={"summary": {"line": "less"}})
    assert judge(old, known)["baseline.sparse"].status == "not checked"


def test_layers_that_lost_a_sparse_kernel(make: Make) -> None:
    for name, rows in {
        "dense": [engine_row("c.weight", engine={"sparse_chosen": False}), engine_row("f.weight")],
        "gone": [engine_row("f.weight")],
    }.items():
        found = judge(make(name), theirs := make(f"their-{name}"))["baseline.sparse"]
        assert found.status == "pass"
        worse = judge(make(f"{name}-worse", built={"layers": rows}), theirs)["baseline.sparse"]
        assert (worse.status, worse.figures["lost"]) == ("fail", ["c.weight"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (engine_row("c.weight", placement="float"), "c.weight: float, in the baseline sparse-int8"),
        (engine_row("c.weight", bits=8), "c.weight: 8 bits, in the baseline 4"),
        (engine_row("c.weight", pattern=None), "c.weight: dense, in the baseline 2:4"),
        (engine_row("c.weight", engine={"held": False, "dtype": "Float"}), "c.weight: held as Float, not as placed"),
        (engine_row("other.weight"), "c.weight: not in this engine"),
    ],
)
def test_layers_that_lost_their_compression_are_named(make: Make, row: Any, said: str) -> None:
    found = judge(make("ours", built={"layers": [row, engine_row("f.weight")]}), make("theirs"))["baseline.layers"]
    assert (found.status, said in found.detail) == ("fail", True)
    assert found.figures["lost"] == ["c.weight"]


def test_a_layer_list_that_is_not_a_build_s_fails(make: Make) -> None:
    found = judge(make("ours", built={"layers": [{"name": "c.weight"}]}), make("theirs"))
    assert found["baseline.layers"].status == found["baseline.sparse"].status == "fail"
    assert "layers.json of this run is not a build's: 'placement'." in found["baseline.layers"].detail


def test_a_baseline_of_another_version_is_not_compared_with_where_it_is_not_read(make: Make) -> None:
    """Its files are those of its manifest: they are in order, and of another form."""
    ours, theirs = bench(make("ours"), 1.0), make("theirs", built={"layers": [{"name": "c.weight"}]})
    (theirs.fresh_partial("train") / "metrics.json").write_text("[]")
    theirs.commit("train", {}, {})
    bench(theirs, 1.0, engine={})
    found = judge(ours, theirs)
    del found["baseline.size"]
    assert {check.status for check in found.values()} == {"not checked"}
    assert found["baseline.latency"].detail.startswith("bench.json of the baseline is none of ours")


def test_our_own_damaged_files_are_no_pass(make: Make) -> None:
    ours, theirs = make("ours"), make("theirs")
    for name in ("train/metrics.json", "build/a100/layers.json"):
        (ours.path / name).write_text("{}")
    found = judge(ours, theirs)
    assert {name: check.status for name, check in found.items() if name != "baseline.size"} == {
        "baseline.metric": "not checked", "baseline.latency": "not checked",
        "baseline.sparse": "not checked", "baseline.layers": "not checked",
    }  # fmt: skip
    assert found["baseline.metric"].detail == "train/metrics.json of this run is not the one that its manifest lists"


def test_the_metric_of_the_onnx_files_where_both_are_known(make: Make) -> None:
    ours, theirs = make("ours"), make("theirs")
    verdict = {"verdict": "pass", "checks": [{"name": "metric", "status": "pass", "figures": {"onnx": 0.5}}]}
    (theirs.fresh_partial("verify/a100") / "verify.json").write_text(json.dumps(verdict))
    key = {"input export/model.onnx": theirs.records["export"].outputs["export/model.onnx"].sha256}
    theirs.commit("verify/a100", key, {})
    worse = judge(ours, theirs, onnx_metric(0.49))["baseline.metric"]
    assert (worse.status, worse.figures["of"]) == ("fail", "ONNX file")
    assert worse.figures["accuracy"] == {"value": 0.49, "baseline": 0.5, "drop": 0.02}
    assert judge(ours, theirs, onnx_metric(0.49), metric_drop=0.03)["baseline.metric"].status == "pass"
    assert judge(ours, theirs, METRIC)["baseline.metric"].figures["of"] == "trained model"
    impossible = judge(ours, theirs, Check("metric", "fail", "NaN"))["baseline.metric"]
    assert impossible.status == "not checked"


def test_a_verdict_of_another_onnx_file_is_not_taken(make: Make) -> None:
    theirs = make("theirs")
    verdict = {"verdict": "pass", "checks": [{"name": "metric", "status": "pass", "figures": {"onnx": 0.1}}]}
    (theirs.fresh_partial("verify/a100") / "verify.json").write_text(json.dumps(verdict))
    theirs.commit("verify/a100", {"input export/model.onnx": "0"}, {})
    found = judge(make("ours"), theirs, onnx_metric(0.8))["baseline.metric"]
    assert (found.status, found.figures["of"]) == ("pass", "trained model")


def test_changed_data_is_not_compared(make: Make) -> None:
    ours, theirs = make("ours"), make("theirs")
    theirs.records["train"].key["data.source files"] = "1"
    found = judge(ours, theirs)["baseline.metric"]
    assert (found.status, found.detail.startswith("data.source files changed")) == ("not checked", True)


def test_another_metric_is_not_compared(make: Make) -> None:
    ours, theirs = make("ours"), make("theirs")
    figures = {"metric": "mask_map", "compressed": {"mask_map": 0.3, "box_map": 0.4}}
    (ours.fresh_partial("train") / "metrics.json").write_text(json.dumps(figures))
    ours.commit("train", {}, {})
    found = judge(ours, theirs)["baseline.metric"]
    assert found.detail == "this run is judged by mask_map, the baseline by accuracy"


def test_the_packed_file_counts_where_both_have_one(make: Make) -> None:
    ours, theirs = make("ours"), make("theirs")
    (theirs.path / "model.slope").write_bytes(b"1234")  # no manifest speaks of it
    for run, contents in ((ours, b"12345"), (theirs, b"1234")):
        assert "model.slope" not in judge(ours, theirs)["baseline.size"].figures
        (run.fresh_partial("pack") / "model.slope").write_bytes(contents)
        run.commit("pack", {}, {})
    found = judge(ours, theirs)["baseline.size"]
    assert (found.status, found.figures["model.slope"]["growth"]) == ("fail", 0.25)
