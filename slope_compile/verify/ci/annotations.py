"""GitHub's workflow commands: one `::error` for each reason for the verdict `fail`, and one notice.

The runner reads them from either stream, at the beginning of a line; so a line must never be broken, and what comes
from a file must never begin one. It shows ten of a kind a step: the summary has all.
"""

from __future__ import annotations

import re

from slope_compile.verify.ci.verified import Verified, plain

_COMMAND = re.compile(r":(?=:)|#(?=#\[)")


def workflow_commands(verified: Verified) -> list[str]:
    """Return the lines to print: errors in order, then a notice that lists what was not checked."""
    lines = [workflow_command("error", f.title, f.detail, f.file) for f in verified.findings()]
    unchecked = [
        f"{check['name']}{' (' + check['target'] + ')' if check.get('target') else ''}: {check['detail']}"
        for check in verified.checks
        if check["status"] == "not checked"
    ]
    if unchecked:
        lines.append(workflow_command("notice", f"not checked of {verified.name}", "\n".join(unchecked)))
    return lines


def workflow_command(kind: str, title: str, message: str, file: str | None = None) -> str:
    """Return one workflow command.

    Args:
        kind: `error`, `warning` or `notice`.
        title: What stands above the message.
        message: May have several lines.
        file: What it is about, as the repository names it.
    """
    properties = {"file": file, "title": f"slope-compile verify: {title}"}
    told = ",".join(
        f"{name}={_property(commandless(plain(value)))}" for name, value in properties.items() if value is not None
    )
    lines = (commandless(plain(line)) for line in message.splitlines())
    return f"::{kind} {told}::{_escaped(chr(10).join(lines))}"


def commandless(text: str) -> str:
    """Return text in which GitHub's runner finds no command, wherever a width breaks it.

    The runner obeys `::command::` at the beginning of a line, and the old form `##[command]` anywhere in one.
    """
    return _COMMAND.sub(lambda found: f"{found[0]} ", text)


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
