"""`slope-compile bundle`: one archive that a device builds from; and what `build`, `verify`, `inspect` do with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.errors import BackendError, RecipeError
from slope_compile.events import Events
from slope_compile_cli import options
from slope_compile_cli.console import Console, StageProgress
from slope_compile_cli.explained import tell_verdict
from slope_compile_cli.interrupt import raise_again
from slope_compile_cli.reports import Reports

if TYPE_CHECKING:
    from slope_compile.bundle.build import EngineOutcome
    from slope_compile.bundle.contents import Contents
    from slope_compile.bundle.opened import OpenBundle

Archive = Annotated[Path | None, typer.Option("--out", help="The archive. Default: RUN.TARGET.bundle.zip beside RUN.")]
Version = Annotated[
    str | None,
    typer.Option("--tensorrt", help="TensorRT's version on the device. Default: the first that runs on the target."),
]
SUFFIX = ".zip"


def command(
    run: options.RunArgument,
    target: options.Target = None,
    out: Archive = None,
    tensorrt: Version = None,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Write one archive for each target, to build from and to verify on a device without torch."""
    from slope_compile.bundle.make import bundle_run

    console = Console(json)
    recipe = options.recipe_of(run, settings or [])
    targets = list(dict.fromkeys(target or recipe.build.targets))
    if out is not None and len(targets) > 1:
        raise RecipeError(
            f"--out {out} is one archive, for one target; there are {len(targets)}.", "Name one --target."
        )
    if out is not None and out.suffix != SUFFIX:
        raise RecipeError(f"--out {out} does not end in {SUFFIX}.", f"Example: --out {out.name}.bundle{SUFFIX}")
    progress = StageProgress(console)
    made = []
    for name in targets:
        with progress.drawing():
            archive, contents = bundle_run(RunFolder(run), recipe, name, Events(listeners=[progress]), out, tensorrt)
        made.append(_described(archive, contents))
        _tell(console, archive, contents)
    console.result({"run": str(run), "bundles": made})


def is_bundle(source: Path) -> bool:
    """Whether an argument names an archive, or the folder of one that was unpacked."""
    from slope_compile.bundle.opened import is_bundle

    return is_bundle(source)


def folder_of(source: Path) -> Path:
    """Return the folder of a bundle: itself, or the one beside the archive."""
    from slope_compile.bundle.opened import default_folder

    return source if source.is_dir() else default_folder(source)


def build(
    console: Console, source: Path, out: Path | None, targets: Sequence[str] | None, force: bool
) -> EngineOutcome:
    """Build the engine of a bundle; its folder is beside the archive, or `out`."""
    from slope_compile.bundle.build import build_bundle, require_here

    with _opened(console, source, out, targets, require_here) as (bundle, events):
        return build_bundle(bundle, events, force)


def verify(
    console: Console,
    reports: Reports,
    source: Path,
    targets: Sequence[str] | None,
    require: Sequence[str],
    trust_engine: bool,
) -> dict[str, Any]:
    """Verify a bundle, and its engine where one was built; return what --json prints.

    Args:
        console: Where to print.
        reports: What --ci wants.
        source: The archive, or the folder of one.
        targets: For which it should be.
        require: Checks that must pass.
        trust_engine: Load the engine although the manifest has not its sha256.
    """
    from slope_compile.bundle.verify import verify_bundle
    from slope_compile.verify.require import parse_required

    required = parse_required(require)
    with _opened(console, source, None, targets) as (bundle, events):
        reports.prepare()
        verdict = verify_bundle(bundle, events, required, trust_engine).to_json()
    tell_verdict(console, verdict, lambda _: bundle.folder.path / "verify" / bundle.contents.target)
    about = {"folder": str(bundle.folder.path), "target": bundle.contents.target}
    return {**about, **verdict, **reports.write("bundle", verdict)}


@contextmanager
def _opened(
    console: Console,
    source: Path,
    out: Path | None,
    targets: Sequence[str] | None,
    require: Callable[[Contents], None] | None = None,
) -> Iterator[tuple[OpenBundle, Events]]:
    """Give a bundle whose folder is held, and where to tell what is done with it."""
    from slope_compile.bundle.opened import open_bundle

    if out is not None and source.is_dir():
        raise RecipeError(f"{source} is a bundle's folder already; --out goes with the archive.", "Leave --out out.")

    def fits(contents: Contents) -> None:
        if strange := [name for name in targets or [] if name != contents.target]:
            raise BackendError(
                f"{source} is a bundle for {contents.target}, not for {strange[0]}.",
                f"Leave --target out, or make one: `slope-compile bundle RUN --target {strange[0]}`.",
            )
        if require is not None:
            require(contents)

    progress = StageProgress(console)
    with progress.drawing(), open_bundle(source, out, fits) as bundle:
        yield bundle, Events(bundle.folder.path / "events.jsonl", [progress, raise_again])


def inspect(console: Console, source: Path) -> None:
    """Print what an archive, or the folder of one, holds; every checksum is compared, nothing is written."""
    if source.is_dir():
        _inspect_folder(console, source)
        return
    from slope_compile.bundle.archive import prove

    contents = prove(source)
    _tell(console, source, contents)
    console.result(_described(source, contents))


def _inspect_folder(console: Console, path: Path) -> None:
    from slope_compile.bundle.opened import contents_in

    folder = RunFolder.existing(path)
    contents = contents_in(folder)
    states = {stage: "; ".join(map(str, folder.mismatches(stage))) or "ok" for stage in sorted(folder.records)}
    _tell(console, path, contents)
    console.table(
        "stages", ("stage", "files", "state"), [(s, len(folder.records[s].outputs), t) for s, t in states.items()]
    )
    console.result({"folder": str(path), "stages": states, **contents.model_dump(mode="json", by_alias=True)})


def refuse(source: Path, **given: object) -> None:
    """Raise if an option was given that a bundle has no use for: its recipe and its target are settled."""
    useless = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if useless:
        raise RecipeError(
            f"{source} is a bundle, whose target and recipe are settled; {', '.join(useless)} goes with a run folder.",
            "Leave it out, or make another bundle with `slope-compile bundle`.",
        )


def _described(archive: Path, contents: Contents) -> dict[str, Any]:
    from slope_compile.artifacts import FileDigest

    measured = FileDigest.of(archive)
    return {
        "bundle": str(archive),
        "bytes": measured.size,
        "sha256": measured.sha256,
        **contents.model_dump(mode="json", by_alias=True),
    }


def _tell(console: Console, archive: Path, contents: Contents) -> None:
    rows = [(name, entry.size, entry.sha256[:16]) for name, entry in sorted(contents.files.items())]
    console.table(str(archive), ("file", "bytes", "sha256 begins"), rows)
    console.say(f"{contents.name} for {contents.target}, in {contents.precision} ({contents.precision_reason})")
    console.say(f"to be built with {contents.backend} {contents.version_range}; placed for {contents.planned_for}")
    measured = [(which, contents.accuracies.get(which)) for which in ("fp32", "compressed")]
    figures = ", ".join(f"{which} {value:.4f}" for which, value in measured if value is not None)
    console.say(f"{contents.metric} as trained: {figures or 'not measured'}")
    if archive.is_file():
        console.say(f"{archive.stat().st_size} bytes; every checksum holds")
