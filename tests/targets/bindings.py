"""Writes data/bindings-NAME-VERSION.json from a wheel of NVIDIA's Python bindings: what is there, and how it is called.

The wheel holds no GPU library. It imports once empty libraries stand in for the ones it links to, which needs `gcc`:

    pip download --no-deps tensorrt-cu12-bindings==10.3.0
    python tests/targets/bindings.py tensorrt_cu12_bindings-10.3.0-*.whl

Enums are kept with all their members; classes with their attributes, and for methods the arguments of each overload as
pybind11 tells them (a name that ends in `=` has a default). No wheel is committed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

ENUMS = (
    "BuilderFlag", "ComputeCapability", "DataType", "DeviceType", "EngineCapability", "HardwareCompatibilityLevel",
    "LayerInformationFormat", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParserFlag", "PreviewFeature",
    "ProfilingVerbosity", "RuntimePlatform", "TacticSource",
)  # fmt: skip
CLASSES = (
    "Builder", "EngineInspector", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILogger",
    "INetworkDefinition", "IOptimizationProfile", "ITimingCache", "OnnxParser", "ParserError", "Refitter", "Runtime",
)  # fmt: skip
# What the bindings take from the libraries they link to; nothing calls it while they are read.
ENTRIES = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
DATA = Path(__file__).parent / "data"


def main(wheel: Path) -> None:
    """Read one wheel in a process whose libraries are the empty ones."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(folder)
        package = next(entry.name for entry in Path(folder).glob("*_bindings"))
        _write_stubs(Path(folder), next(Path(folder, package).glob("*.so")))
        command = [sys.executable, __file__, "--read", folder, package]
        environment = {**os.environ, "LD_LIBRARY_PATH": folder}
        text = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {"wheel": wheel.name, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(), **json.loads(text)}
    name = "rtx" if "rtx" in package else "tensorrt"
    path = DATA / f"bindings-{name}-{found['version']}.json"
    DATA.mkdir(exist_ok=True)
    path.write_text(_compact(found), encoding="utf-8")
    sys.stderr.write(f"{path}\n")


def _write_stubs(folder: Path, bindings: Path) -> None:
    """Compile an empty library under every name of NVIDIA's that the bindings link to."""
    linked = subprocess.run(["readelf", "-d", str(bindings)], stdout=subprocess.PIPE, text=True, check=True).stdout
    source = folder / "stub.c"
    source.write_text("\n".join(f"void *{entry}(void) {{ return 0; }}" for entry in ENTRIES))
    for library in re.findall(r"\[(lib(?:nv|tensorrt)[^\]]*)\]", linked):
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / library), str(source)], check=True)


def read(folder: str, package: str) -> dict[str, Any]:
    """Return version, enums and classes of the bindings in a folder."""
    sys.path.insert(0, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trt = importlib.import_module(package)
    enums = {name: list(getattr(trt, name).__members__) for name in ENUMS if hasattr(trt, name)}
    classes = {name: _class(getattr(trt, name)) for name in CLASSES if hasattr(trt, name)}
    return {"version": trt.__version__, "enums": enums, "classes": classes}


def _class(kind: type) -> dict[str, list[list[str]] | None]:
    """Return attribute -> arguments of each overload of the method, None for what is no method."""
    found: dict[str, list[list[str]] | None] = {}
    for name in sorted(dir(kind)):
        if name == "__init__" or not name.startswith("_"):
            doc = getattr(kind, name).__doc__ or ""
            signatures = re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((self.*)\) ->", doc, flags=re.MULTILINE)
            found[name] = [_arguments(signature) for signature in signatures] or None
    return found


def _arguments(signature: str) -> list[str]:
    """Return the names of `self: X, name: T, flag: T = default`, without self; `=` follows one with a default."""
    depth, parts, part = 0, [], ""
    for letter in signature + ",":
        depth += letter in "([{<"
        depth -= letter in ")]}>"
        if letter == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    names = [re.match(r"\w+", part).group() + "=" * (" = " in part) for part in parts if part]  # type: ignore[union-attr]
    return [name for name in names if name != "self"]


def _compact(found: dict[str, Any]) -> str:
    """Return JSON with one line an enum or a class: a change of version then reads as a change of lines."""
    lines = [f' "{key}": {json.dumps(found[key])}' for key in ("wheel", "sha256", "version")]
    for key in ("enums", "classes"):
        rows = ",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in found[key].items())
        lines.append(f' "{key}": {{\n{rows}\n }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        sys.stdout.write(json.dumps(read(*sys.argv[2:4])))
    else:
        for argument in sys.argv[1:]:
            main(Path(argument))
