"""What commands print may come from files that anybody wrote."""

from __future__ import annotations

import pytest
from slope_compile_cli.console import Console

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
