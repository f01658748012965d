"""Entry point: the application, its commands, and what an exception becomes.

Exit codes: 0 done · 1 a check failed · 2 usage, recipe, input, environment · 101 a bug of ours · 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

import typer

from slope_compile._version import __version__
from slope_compile.errors import CheckFailedError, SlopeCompileError
from slope_compile_cli import bench, build, bundle, doctor, export, inspect, pack, recipes, run, train, unpack, verify
from slope_compile_cli.console import Console, json_requested

TRAIN, BASE = "pip install 'slope-compile[train]'", "pip install slope-compile"
# What a device may lack; anything else that is missing is a bug of ours.
INSTALLED_BY = {
    **dict.fromkeys(("torch", "torchvision", "timm", "accelerate", "torchmetrics", "pycocotools", "onnxscript"), TRAIN),
    **dict.fromkeys(("onnx_ir", "onnxruntime", "zstandard"), BASE),
}
BUG = 101
INTERRUPTED = 130
ISSUES = "the project's issue tracker"

app = typer.Typer(
    name="slope-compile",
    help="From a PyTorch model to a verified TensorRT engine with 2:4-sparse, 2- to 4-bit weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.command)
app.command("train")(train.command)
app.command("export")(export.command)
app.command("build")(build.command)
app.command("bundle")(bundle.command)
app.command("verify")(verify.command)
app.command("bench")(bench.command)
app.command("pack")(pack.command)
app.command("unpack")(unpack.command)
app.command("inspect")(inspect.command)
app.add_typer(recipes.app, name="recipes")
app.command("doctor")(doctor.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slope-compile {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of the whole program."""


def _interrupted(console: Console) -> None:
    console.failure("Interrupted.", "The same command, without --force, goes on from there.", INTERRUPTED)


def _bug(console: Console, error: Exception) -> NoReturn:
    console.trace(traceback.format_exc())
    remedy = f"Please report it on {ISSUES} with the lines above and the output of `slope-compile doctor`."
    console.failure(f"A bug in slope-compile: {type(error).__name__}: {error}.", remedy, BUG)
    sys.exit(BUG)


def main() -> None:
    """Run the command line and exit with the code that the outcome deserves."""
    console = Console(json=json_requested(sys.argv))
    try:
        app()
    except SystemExit as end:
        if end.code == 2 and not isinstance(end.__context__, typer.Exit):  # typer has told people already
            console.result({"error": {"problem": "usage", "remedy": "See --help.", "exit_code": 2}})
        if end.code == INTERRUPTED:
            _interrupted(console)
        raise
    except CheckFailedError as error:
        console.failure(str(error), "", 1)
        sys.exit(1)
    except SlopeCompileError as error:
        console.failure(error.problem, error.remedy, 2)
        sys.exit(2)
    except OSError as error:
        console.failure(
            f"{error.filename or 'The system'}: {error.strerror or error}.", "Check path, rights and space.", 2
        )
        sys.exit(2)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in INSTALLED_BY:
            _bug(console, error)
        how = f"Install it: {INSTALLED_BY[missing]}. On a device, build from a bundle: `slope-compile bundle`."
        console.failure(f"This command needs {missing}, which is not installed here.", how, 2)
        sys.exit(2)
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # some libraries wrap it while they are being imported
            _interrupted(console)
            sys.exit(INTERRUPTED)
        _bug(console, error)
