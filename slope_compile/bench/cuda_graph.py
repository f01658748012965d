"""CUDA graphs through the CUDA runtime library that Polygraphy has loaded: capture once, launch again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads' CUDA calls do not spoil the capture


class CaptureError(Exception):
    """A graph could not be captured; the reason is for the report."""


class CudaGraph:
    """What a function puts on a stream, as one graph.

    Args:
        library: libcudart, as a ctypes library.
        stream: Address of the stream.
        record: Puts the work on the stream.

    Raises:
        CaptureError: If CUDA or the work does not allow a capture.
    """

    def __init__(self, library: Any, stream: int, record: Callable[[], None]) -> None:
        self._library, self._stream = library, ctypes.c_void_p(stream)
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cudaStreamBeginCapture", library.cudaStreamBeginCapture(self._stream, THREAD_LOCAL))
        failure = None
        try:
            record()
        except Exception as error:  # the capture must be ended whatever happens
            failure = error
        ended = library.cudaStreamEndCapture(self._stream, ctypes.byref(self._graph))
        if failure is not None:
            library.cudaGetLastError()  # clears it: what runs next must not inherit it
            raise CaptureError(f"the engine cannot run inside a capture: {failure}") from None
        self._check("cudaStreamEndCapture", ended)
        # The one that has the same arguments in CUDA 11, 12 and 13
        instantiate = library.cudaGraphInstantiateWithFlags
        self._check("cudaGraphInstantiate", instantiate(ctypes.byref(self._executable), self._graph, _NO_FLAGS))

    def launch(self) -> None:
        """Put the graph on its stream.

        Raises:
            CaptureError: If CUDA refuses.
        """
        self._check("cudaGraphLaunch", self._library.cudaGraphLaunch(self._executable, self._stream))

    def _check(self, call: str, status: int) -> None:
        if status:
            self._library.cudaGetLastError()
            raise CaptureError(f"{call} returned CUDA error {status}")


_NO_FLAGS = ctypes.c_ulonglong(0)
