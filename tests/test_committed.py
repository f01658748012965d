"""JSON files that were committed and make no sense: an error that names file and key, whatever they hold."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared_runs import make_run, recipe_of

from slope_compile.artifacts import FileDigest, RunFolder
from slope_compile.committed import committed_json
from slope_compile.errors import ArtifactError
from slope_compile.summary import build_of, summarize, verdict_of

METRICS, LAYERS, BUILT, VERDICT = (
    "train/metrics.json", "export/layers.json", "build/a100/layers.json", "verify/a100/verify.json",
)  # fmt: skip
PLANNED = {"name": "c", "bits": 4, "density": 0.5, "reason": "-"}
FIGURES = {"onnx": 0.8, "accuracy_interval": [0.7, 0.9], "interval": [0.0, 0.1], "certain": True}
CHECKED = {
    "verdict": "pass",
    "checks": [{"name": "metric", "status": "pass", "detail": "-", "figures": {**FIGURES, "box_map": FIGURES}}],
    "required": [{"name": "metric", "status": "pass", "met": True, "detail": "-"}],
}
Edit = Callable[[Any], object]


@pytest.fixture(scope="module")
def made(net: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = make_run(tmp_path_factory.mktemp("committed") / "run", net, recipe=recipe_of())
    (folder.fresh_partial("verify/a100") / "verify.json").write_text(json.dumps(CHECKED))
    folder.commit("verify/a100", {}, {})
    path = folder.path / METRICS
    commit(folder, METRICS, json.loads(path.read_text()) | {"plan": [PLANNED], "layers": {"c": {"cosine": 0.9}}})
    return folder


@pytest.fixture
def run(made: RunFolder) -> Iterator[RunFolder]:
    """The run, as it was again afterwards."""
    before = {name: (made.path / name).read_bytes() for name in (METRICS, LAYERS, BUILT, VERDICT)}
    yield made
    for name, data in before.items():
        (made.path / name).write_bytes(data)
        commit(made, name, None)


def commit(folder: RunFolder, name: str, document: Any) -> None:
    """Write a file of a stage and put its digest into the manifest; None: the file is there."""
    path = folder.path / name
    if document is not None:
        path.write_text(json.dumps(document))
    folder.records[name.rpartition("/")[0]].outputs[name] = FileDigest.of(path)


def everything(folder: RunFolder) -> None:
    """Read what `inspect --json` and `run --json` print, and print it."""
    json.dumps({**summarize(folder), **verdict_of(folder), "built": build_of(folder, "build/a100")})


def drop(*place: Any) -> Edit:
    def edit(told: Any) -> None:
        for key in place[:-1]:
            told = told[key]
        del told[place[-1]]

    return edit


def put(value: Any, *place: Any) -> Edit:
    def edit(told: Any) -> None:
        for key in place[:-1]:
            told = told[key]
        told[place[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "key"),
    [
        (METRICS, drop("metric"), "metric: Field required"),
        (METRICS, put(["accuracy"], "metric"), "metric: Input should be a valid string"),
        (METRICS, put("mask_map", "metric"), "fp32 has no mask_map"),
        (METRICS, put("good", "fp32", "accuracy"), "fp32.accuracy is 'good', no number"),
        (METRICS, put(float("nan"), "fp32", "accuracy"), "fp32.accuracy is nan"),
        (METRICS, put("large", "fp32_bytes"), "fp32_bytes: Input should be a valid integer"),
        (METRICS, put(10**400, "fp32_bytes"), "fp32_bytes is an integer of"),
        (METRICS, put([1], "plan"), "plan.0: Input should be a valid dictionary"),
        (METRICS, put({"c": 1}, "layers"), "layers.c: Input should be a valid dictionary"),
        (LAYERS, drop("layers", 0, "bytes", "fp32"), "layers.0.bytes.fp32: Field required"),
        (LAYERS, put("9:x", "layers", 0, "pattern"), "layers.0.pattern: "),
        (LAYERS, put(-1, "layers", 0, "bytes", "file"), "layers.0.bytes.file: Input should be greater"),
        (LAYERS, put("\ud800", "layers", 1, "reason"), "layers.1.reason is half a character"),
        (BUILT, put(None, "summary"), "summary: Input should be a valid dictionary"),
        (BUILT, put(3, "summary", "line"), "summary.line: Input should be a valid string"),
        (BUILT, drop("layers", 0, "engine", "dtype"), "layers.0.engine.dtype: Field required"),
        (BUILT, put({}, "layers"), "layers: Input should be a valid list"),
        (VERDICT, put("maybe", "checks", 0, "status"), "checks.0.status: Input should be 'pass', 'fail'"),
        (VERDICT, put([1], "checks", 0, "figures", "interval"), "checks.0.interval: List should have at least 2 items"),
        (VERDICT, drop("checks"), "checks: Field required"),
        (VERDICT, put([3], "required"), "required.0: Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_the_file_and_the_key_are_named(run: RunFolder, name: str, edit: Edit, key: str) -> None:
    told = json.loads((run.path / name).read_text())
    edit(told)
    commit(run, name, told)
    with pytest.raises(ArtifactError) as refused:
        everything(run)
    assert f"{name} cannot be read: {key}" in refused.value.problem, refused.value.problem
    assert "--force" in refused.value.remedy


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff", b"[]", b"null"])
def test_no_json_of_ours_at_all(run: RunFolder, data: bytes) -> None:
    (run.path / METRICS).write_bytes(data)
    commit(run, METRICS, None)
    with pytest.raises(ArtifactError, match=r"metrics\.json cannot be read"):
        everything(run)


def test_what_an_older_version_counted_is_read(run: RunFolder) -> None:
    told = json.loads((run.path / BUILT).read_text())
    del told["summary"]["line"]
    for row in told["layers"]:
        del row["fits_2_4"]
    commit(run, BUILT, told)
    assert summarize(run)["engines"] == {"a100": None}


def test_what_an_older_version_did_not_tell_apart_is_read(run: RunFolder) -> None:
    built = build_of(run, "build/a100")
    commit(run, BUILT, built | {"summary": {key: v for key, v in built["summary"].items() if key != "not_found"}})
    everything(run)


def test_a_model_without_a_figure_has_none(run: RunFolder) -> None:
    told = json.loads((run.path / METRICS).read_text())
    commit(run, METRICS, told | {"fp32": None})
    assert summarize(run)["accuracies"]["fp32"] is None


VALUES = [
    None, True, -1, 0, 10**30, 10**400, float("nan"), float("inf"), -0.5, 1e308, "", "\ud800", "999:1", [], [1], {},
]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*place, key)
        yield from places(one, (*place, key))


@pytest.mark.parametrize("name", [METRICS, LAYERS, BUILT, VERDICT])
def test_whatever_a_file_holds_it_is_read_or_refused(run: RunFolder, name: str) -> None:
    whole = json.loads((run.path / name).read_text())
    rng = random.Random(0)
    every = list(places(whole))
    for _ in range(120):
        told, place = copy.deepcopy(whole), rng.choice(every)
        (drop(*place) if rng.random() < 0.25 else put(rng.choice(VALUES), *place))(told)
        commit(run, name, told)
        try:
            everything(run)
        except ArtifactError as error:
            assert name in error.problem, error.problem


def test_a_file_of_no_known_form_is_read_as_an_object(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"a": 1}')
    assert committed_json(path, "verify/a100/other.json") == {"a": 1}
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="cannot be read: Input should be"):
        committed_json(path, "verify/a100/other.json")
