"""docs/recipes.md documents every key of a recipe: default, meaning, and an example that parses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from slope_compile.recipe import Recipe, recipe_from
from slope_compile.targets.target import TARGETS

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
REQUIRED = {"model": {"name": "torchvision/resnet18"}, "data": {"source": "digits"}}


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a recipe, by its dotted name."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield f"{prefix}{name}", field.annotation
            yield from sections(field.annotation, f"{prefix}{name}.")


SECTIONS = dict(sections(Recipe))


def part(name: str) -> str:
    """The text under a section's heading, up to the next heading."""
    found = re.search(rf"^#+ {re.escape(name)}\n(.*?)(?=^#|\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, f"docs/recipes.md has no heading '{name}'"
    return found[1]


def rows(name: str) -> dict[str, list[str]]:
    """key -> cells of the section's table."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in part(name).splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("| `"): row[1:] for row in cells}


def examples() -> list[Any]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_and_no_other_is_documented(name: str) -> None:
    assert list(rows(name)) == list(SECTIONS[name].model_fields)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_defaults_are_the_models_own(name: str) -> None:
    for key, (default, *rest) in rows(name).items():
        field = SECTIONS[name].model_fields[key]
        assert len(rest) == 2 and rest[1].endswith("."), f"{name}.{key}: default | values | meaning"
        if field.is_required():
            assert default == "required"
        else:
            value = field.get_default(call_default_factory=True)
            assert yaml.safe_load(default.strip("`")) == (value.model_dump() if isinstance(value, BaseModel) else value)


def test_every_choice_is_documented() -> None:
    for name, model in SECTIONS.items():
        for key, schema in model.model_json_schema()["properties"].items():
            for choice in [
                c for option in (schema, *schema.get("anyOf", [])) for c in option.get("enum", [option.get("const")])
            ]:
                assert choice is None or f"`{choice}`" in rows(name)[key][1], f"{name}.{key}: {choice}"
    assert re.findall(r"`([\w-]+)`", rows("build")["targets"][2]) == list(TARGETS)


def test_the_examples_are_recipes_and_show_every_key() -> None:
    shown: set[str] = set()
    for example in examples():
        recipe_from({**REQUIRED, **example}, "example")
        shown |= {f"{section}.{key}" for section, values in example.items() for key in values}
    assert shown == {
        f"{name}.{key}" for name, model in SECTIONS.items() for key in model.model_fields if "." not in name
    }
