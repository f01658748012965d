"""From a trained model to an ONNX file with coded weights; `slope_compile.export(...)` is `export` in run.py."""

from slope_compile._surface import make_callable

make_callable("slope_compile.export", "slope_compile.export.run", "export")
