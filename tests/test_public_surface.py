from __future__ import annotations

import subprocess
import sys

import slope_compile as sc

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "timm", "torchvision")


def test_exported_names_are_these_and_all_of_them_load() -> None:
    assert sorted(sc.__all__) == [
        "CodedTensor", "Recipe", "__version__", "build", "codes", "compress", "export", "load", "load_recipe", "pack",
        "penalty", "verify",
    ]  # fmt: skip
    for name in sc.__all__:
        assert getattr(sc, name) is not None


def test_a_room_stays_callable_and_a_module_after_its_modules_are_imported() -> None:
    from slope_compile.build import rows

    assert callable(sc.build)
    assert sc.build.rows is rows  # type: ignore[attr-defined]


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & set(HEAVY)


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import slope_compile") == set()


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("import slope_compile_cli.main") == set()


def test_build_verify_and_pack_import_no_torch() -> None:
    rooms = "slope_compile.build.single, slope_compile.verify.run, slope_compile.qdq.checks, slope_compile.pack.single"
    assert "torch" not in imported_by(f"import {rooms}, slope_compile.codes_file")
