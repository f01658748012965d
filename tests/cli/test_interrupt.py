from __future__ import annotations

import os
import signal
import subprocess
import sys

SWALLOWED = """
import contextlib, os, signal
from slope_compile.events import Events
from slope_compile_cli.interrupt import raise_again, watch
watch()
events = Events(listeners=[raise_again])
events.note("train", "before")
with contextlib.suppress(BaseException):  # as a library with a bare except does
    os.kill(os.getpid(), signal.SIGINT)
try:
    events.note("train", "after")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_swallowed_ctrl_c_is_raised_again_at_the_next_event() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "interrupted\n", done.stderr
    assert done.returncode != -signal.SIGINT
