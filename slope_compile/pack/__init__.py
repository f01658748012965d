"""The packed file: a model's codes or an ONNX file, as small as it is stored and sent. Needs no torch to read."""

from slope_compile._surface import make_callable

make_callable(__name__, "slope_compile.pack.single", "pack")
