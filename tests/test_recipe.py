from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_compile.errors import RecipeError
from slope_compile.recipe import BuildSection, Recipe, build_section, load_recipe, parse_pattern, shipped_recipes


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: torchvision/resnet18}\ndata: {source: digits}\n")
    return path


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_start_with_their_command(name: str) -> None:
    assert shipped_recipes()[name].startswith(f"# slope-compile run {name}\n")
    assert isinstance(load_recipe(name), Recipe)


def test_resolved_yaml_loads_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("digits-resnet18", ["compression.overrides={layer1.*: {bits: 2}, fc: off}"])
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_set_beats_file_and_file_beats_default(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "train: {epochs: 7}\n")
    assert load_recipe(recipe_file).train.epochs == 7
    assert load_recipe(recipe_file, ["train.epochs=9"]).train.epochs == 9
    assert load_recipe(recipe_file).train.seed == 0


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("compression.pattern=1:4", "1:4"),
        ("compression.pattern=2:16", "2:16"),
        ("compression.pattern=null", None),
        ("compression.pattern=none", None),
    ],
)
def test_patterns_by_set(setting: str, expected: str | None) -> None:
    assert load_recipe("digits-resnet18", [setting]).compression.pattern == expected


def test_an_unquoted_pattern_is_not_a_base_60_number(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "compression: {pattern: 2:4}\n")
    assert load_recipe(recipe_file).compression.pattern == "2:4"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("compression.bit=2", ["compression.bit", "Did you mean 'bits'?"]),
        ("compresion.bits=2", ["compresion", "Did you mean 'compression'?"]),
        ("compression.bits=9", ["compression.bits", "9"]),
        ("compression.pattern=4:2", ["'4:2'", "n:m"]),
        ("compression.overrides={fc: {bit: 2}}", ["fc", "Did you mean 'bits'?"]),
        ("build.batch={min: 4, opt: 2, max: 8}", ["min <= opt <= max"]),
        ("train.lr=nan", ["train.lr"]),
        ("train", ["section.key=value"]),
        ("model.name.x=1", ["model.name.x"]),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("digits-resnet18", [setting])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "- a\n", "model: [\n", "model: {name: a}\n", "{" * 5000])
def test_bad_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'digits-resnet18'"):
        load_recipe("digits-resnet81")


def test_digest_follows_only_the_named_sections() -> None:
    one, two = load_recipe("digits-resnet18"), load_recipe("digits-resnet18", ["verify.metric_drop=0.5"])
    assert one.digest("train", "model") == two.digest("train", "model")
    assert one.digest("verify") != two.digest("verify")


@given(st.text(max_size=8))
def test_parse_pattern_accepts_only_n_of_m(text: str) -> None:
    try:
        n, m = parse_pattern(text)
    except ValueError:
        return
    assert 1 <= n <= m <= 64


def test_the_build_of_a_model_without_a_run() -> None:
    section = build_section({"targets": ["l4"]}, ["build.batch.max=8", "build.dla=1", "build.precision=fp16"], "m.onnx")
    assert (section.targets, section.batch.max, section.dla, section.precision) == (["l4"], 8, 1, "fp16")
    assert build_section({}, (), "m.onnx") == BuildSection()
    for setting, what in (
        ("train.epochs=2", r"m\.onnx belongs to no run"),
        ("build.precison=fp16", "Did you mean 'precision'"),
        ("build.dla=-1", "'build.dla' is -1"),
        ("build.dla", "not of the form"),
    ):
        with pytest.raises(RecipeError, match=what):
            build_section({}, [setting], "m.onnx")
