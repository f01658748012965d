"""What commands print may come from files that anybody wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slope_compile_cli.console import Console
from slope_compile_cli.explained import tell_verdict

EVIL = "a[bold]b\x1b[2Jc\x07\x9bd\re\u202ef"
SHOWN = "a[bold]b\ufffd[2Jc\ufffd\ufffdd\ufffde\ufffdf"


def test_markup_and_control_characters_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say(EVIL)
    console.table(EVIL, ["layer"], [[EVIL]])
    console.failure(EVIL, EVIL, 2)
    console.checks({"verdict": "fail", "checks": [{"name": EVIL, "status": "fail", "detail": EVIL}]})
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 5
    assert err.count(SHOWN) == 2
    assert not any(character in out + err for character in "\x1b\x07\x9b\r\u202e")


COMMANDS = "conv\n::stop-commands::zz\r::set-output name=x::y\t##[error]broken ::: ##["


def test_what_a_file_says_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say(COMMANDS)
    console.failure(COMMANDS, COMMANDS, 2)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(err.splitlines()) == 1
    assert "##[error]broken" in out  # whole, where no runner reads it


def test_githubs_runner_finds_no_command_in_what_a_file_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("COLUMNS", "40")
    console = Console()
    for text in (COMMANDS, "::stop-commands::zz", f"{'wide ' * 9}::stop-commands::zz ##[group]"):
        side = {"shape": text}
        found = {
            "layer": text, "operator": text, "cause": text, "reference": side, "tested": side, "reproducer": text,
            "command": text,
        }  # fmt: skip
        check = {"name": text, "status": "fail", "detail": text, "figures": {"diverges": found}, "target": text}
        row = {"name": text, "status": "fail", "detail": text, "met": False}
        tell_verdict(console, {"verdict": "fail", "checks": [check], "required": [row]}, lambda _: Path("runs"))
        console.say(text)
        console.table(text, ["layer"], [[text]])
        console.failure(text, text, 2)
        console.trace(f"Traceback\n{text}\n")
    for line in [line for stream in capsys.readouterr() for line in stream.splitlines()]:
        assert not line.lstrip().startswith("::"), line
        assert "##[" not in line, line


def test_json_stays_what_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for text in (COMMANDS, "\\##[a]", "###[a]"):
        Console(json=True).result({"name": text})
        out = capsys.readouterr().out
        assert json.loads(out) == {"name": text}
        assert "##[" not in out
