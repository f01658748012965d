"""Every `slope-compile …` on our pages is a command line that the program takes: parsed here, not run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from slope_compile_cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md")])
SERVICES = "|".join(yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"])
# The program by its own name, as a container of one of our images, or as a service of compose.yaml.
PROGRAM = rf"(?:slope-compile|slope-compile:[\w.-]+|run --rm (?:--\S+ (?:\"[^\"]*\" )?)*(?:{SERVICES})) (.*)"
OPTIONAL = re.compile(r"\[(--[^]]*?)(?: …)?\]")  # as a usage line writes it
AFTER = re.compile(r"\s(?:&&|\|\|?|;|>)\s")  # what follows is another command


def lines(text: str) -> Iterator[str]:
    """Lines of code, continued ones joined: fenced or indented blocks, and `code` in a sentence, wrapped or not."""
    prose, fenced = [], False
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ")
        else:
            prose.append(line.strip())
    yield from re.findall(r"`([^`]+)`", " ".join(prose))


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every call of the program."""
    for line in lines(text):
        for part in AFTER.split(line):
            found = re.search(rf"(?:^|[\s/]){PROGRAM}", part)
            if found and not re.match(r"docker build |docker compose .* build ", part):
                yield shlex.split(OPTIONAL.sub(r"\1", found[1]), comments=True)


def refusal(arguments: list[str]) -> str:
    """Why the program would refuse a command line; empty: it takes it."""
    try:
        take(arguments)
    except Exception as error:  # the parser's own: typer vendors them
        return getattr(error, "message", "") or repr(error)
    return ""


def take(arguments: list[str]) -> None:
    """Parse a command line as the program would, and run nothing."""
    group = typer.main.get_command(app)
    context = group.make_context("slope-compile", list(arguments))  # type: ignore[attr-defined]
    while hasattr(group, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, group, rest = group.resolve_command(context, rest)
        if not rest:  # a command is spoken of
            return
        context = group.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_program_takes_every_command_of_a_page(page: Path) -> None:
    refused = {shlex.join(line): why for line in commands(page.read_text(encoding="utf-8")) if (why := refusal(line))}
    assert not refused


@pytest.mark.parametrize("line", ["bild runs/x", "build runs/x --tarket orin", "recipes show a b", "verify a b"])
def test_a_wrong_one_is_found(line: str) -> None:
    assert refusal(line.split())


def test_the_guides_are_read() -> None:
    for name in ("deploy-a100.md", "deploy-jetson.md"):
        found = {arguments[0] for arguments in commands((ROOT / "docs" / name).read_text(encoding="utf-8"))}
        assert {"run", "bundle", "build", "verify", "bench", "doctor"} <= found, name


def test_what_is_a_command_and_what_is_none() -> None:
    text = """Run `slope-compile verify
RUN` after `pip install slope-compile`:

    docker run --rm --gpus all -v "$PWD:/runs" slope-compile:a100-trt10 build x.bundle.zip --require 'sparse>=10'
    docker build -f docker/Dockerfile -t slope-compile:a100-trt10 .
    docker compose -f docker/compose.yaml run --rm --user "$(id -u):$(id -g)" jetson-jp6 bench \\
        x.engine | tee x.txt
    .venv/bin/slope-compile run digits-resnet18  # train, export
    slope-compile build BUNDLE [--force] [--require sparse>=10 …]
"""
    assert list(commands(text)) == [
        ["build", "x.bundle.zip", "--require", "sparse>=10"],
        ["bench", "x.engine"],
        ["run", "digits-resnet18"],
        ["build", "BUNDLE", "--force", "--require", "sparse>=10"],
        ["verify", "RUN"],
    ]
