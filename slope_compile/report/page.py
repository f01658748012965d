"""One self-contained HTML page per run: no script, no network, no other file; the same run gives the same bytes."""

from __future__ import annotations

from importlib import resources

from slope_compile._version import __version__
from slope_compile.report.accuracy import accuracy, metric_heading
from slope_compile.report.chain import chain
from slope_compile.report.curves import direction, steps, training
from slope_compile.report.data import RunData, SizeRow
from slope_compile.report.findings import failed_checks, failures, unchecked
from slope_compile.report.heat import heat
from slope_compile.report.layers import layers
from slope_compile.report.markup import Markup, tag
from slope_compile.report.results import checks, pipeline, tiles, verdict_banner
from slope_compile.report.tables import absent, code, details, section, table, value_text

__all__ = ["RunData", "SizeRow", "render"]

CONTENTS = {
    "failed": "What failed",
    "chain": "The chain",
    "unchecked": "Not checked",
    "accuracy": "Accuracy",
    "pipeline": "Pipeline and sizes",
    "heat": "Error by layer",
    "checks": "Checks",
    "layers": "Layers",
    "training": "Training",
    "direction": "Weight direction",
    "steps": "Steps and flips",
    "setup": "Recipe and versions",
}
# The browser itself refuses to load anything, whatever the page might come to hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(data: RunData) -> str:
    """Return the report of a run as an HTML document.

    Args:
        data: What the run folder holds; absent stages are said to be absent.
    """
    main = tag(
        "main",
        verdict_banner(data),
        tiles(data),
        failures(data),
        chain(data),
        unchecked(data),
        accuracy(data),
        pipeline(data),
        heat(data),
        checks(data),
        layers(data),
        training(data),
        direction(data),
        steps(data),
        _setup(data),
    )
    body = tag(
        "body",
        _header(data),
        main,
        tag("footer", tag("p", f"Written by slope-compile {__version__} from the files of the run.")),
    )
    return f"<!DOCTYPE html>\n{tag('html', _head(data), body, lang='en')}\n"


def _head(data: RunData) -> Markup:
    style = resources.files("slope_compile.report").joinpath("style.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{data.name}: slope-compile report"),
        # Our own file, and CSS would not survive escaping.
        tag("style", Markup(style)),
    )


def _header(data: RunData) -> Markup:
    contents = {**CONTENTS, "accuracy": metric_heading(data)}
    if not failed_checks(data):
        del contents["failed"]
    entries = (tag("li", tag("a", title, href=f"#{anchor}")) for anchor, title in contents.items())
    return tag(
        "header",
        tag("p", "slope-compile report", class_="kind"),
        tag("h1", data.name),
        tag("p", _summary(data), class_="summary"),
        tag("nav", tag("ul", *entries), aria_label="Contents"),
    )


def _summary(data: RunData) -> str:
    """One line of what was asked for, as far as the recipe says it."""
    bits, pattern = data.setting("compression", "bits"), data.setting("compression", "pattern")
    regularizer, activations = (data.setting("compression", key) for key in ("regularizer", "activation_bits"))
    parts = [
        data.setting("model", "name"),
        data.setting("data", "source"),
        f"{pattern or 'dense'}, {bits} bits" if bits is not None else None,
        f"activations of {activations} bits" if activations is not None else None,
        f"regularizer {regularizer}" if regularizer else None,
        f"seed {data.setting('train', 'seed')}" if data.setting("train", "seed") is not None else None,
    ]
    return " · ".join(str(part) for part in parts if part)


def _setup(data: RunData) -> Markup:
    keys = [
        [code(f"{name}.{key}"), value_text(value)]
        for name, values in data.recipe.items()
        for key, value in (values or {}).items()
    ]
    recipe = (
        table("The recipe as it was run, defaults spelt out", ["Key", "Value"], keys)
        if keys
        else absent("No recipe was kept.")
    )
    found = [[code(name), version] for name, version in sorted(data.versions.items())]
    versions = (
        table("Versions that made this run", ["Package", "Version"], found)
        if found
        else absent("No versions were recorded.")
    )
    return section(
        "setup",
        "Recipe and versions",
        details(f"Recipe ({len(keys)} keys)" if keys else "Recipe", recipe),
        details("Versions", versions),
    )
