"""Verification: pattern, codes, parity between stages, task metric. Needs no torch until a torch model is to be run."""

from slope_compile._surface import make_callable

make_callable(__name__, "slope_compile.verify.run", "verify")
