"""From ONNX to a TensorRT engine for one target. Needs no torch."""

from slope_compile._surface import make_callable

make_callable(__name__, "slope_compile.build.single", "build")
