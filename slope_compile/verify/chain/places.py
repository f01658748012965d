"""The chain: one set of inputs at each place between the trained model and what is deployed, and what came out there.

    trained -> folded -> onnx -> onnx-default -> engine         placed: the file that the engine is built from

`trained` multiplies with the weights as training computes them, `folded` with the codes times the scales, `onnx` is the
file in ONNX Runtime without optimizations, `onnx-default` with those that its users run it with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from slope_compile.verify.chain.golden import read_golden
from slope_compile.verify.chain.runners import (
    Arrays,
    TorchRunner,
    default_session,
    infer,
    infer_onnx,
    random_feed,
    reference_session,
)
from slope_compile.verify.parity.outputs import named
from slope_compile.verify.verdict import NotCheckedError, Once, reason

if TYPE_CHECKING:
    from torch import nn

TRAINED: Final = "trained"
FOLDED: Final = "folded"
ONNX: Final = "onnx"
DEFAULT: Final = "onnx-default"
PLACED: Final = "placed"
ENGINE: Final = "engine"
PLACES = (TRAINED, FOLDED, ONNX, DEFAULT, PLACED, ENGINE)
_STANDS_ON = {FOLDED: TRAINED, DEFAULT: ONNX, PLACED: ONNX}  # what moves there moves here
WORDS = {TRAINED: "the trained model", FOLDED: "the folded model", ONNX: "ONNX Runtime"}


class Chain:
    """The places, each run when a check first asks for it, and its outputs kept for the later ones.

    Args:
        onnx: The ONNX file.
        model: The trained model.
        golden: Inputs and the outputs which the trained model had for them at export, or their file.
        samples: Further inputs, one mapping a feed. None: random ones where there are no golden ones.

    Attributes:
        kept: The golden file as it is read.
        session: The file in ONNX Runtime, optimizations disabled.
        feeds: All inputs: the golden ones first.
        folded_model: A copy of the trained model whose weights are its codes times its scales.
        ran: Outputs by place, one mapping a feed, of the places that were run.
        unsteady: Place -> why what it answers cannot be compared with.
    """

    def __init__(
        self,
        onnx: Path,
        model: Once[nn.Module] | None,
        golden: Path | None,
        samples: Sequence[Arrays] | None,
    ) -> None:
        self.onnx = onnx
        self.model = model
        self.kept = kept = None if golden is None else Once(lambda: read_golden(golden))
        self.golden = None if kept is None else Once(lambda: named(kept(), onnx))
        self.session = Once(lambda: reference_session(onnx))
        self.feeds: Once[list[Arrays]] = Once(self._feeds)
        self.folded_model: Once[nn.Module] = Once(self._fold)
        self.ran: dict[str, list[Arrays]] = {}
        self.unsteady: dict[str, str] = {}
        self._samples = samples
        self._runs: Mapping[str, Once[list[Arrays]]] = {
            TRAINED: Once(lambda: self._torch(self.trained_model())),
            FOLDED: Once(lambda: self._torch(self.folded_model())),
            ONNX: Once(lambda: infer_onnx(self.session(), self.feeds(), ONNX)),
            DEFAULT: Once(lambda: infer_onnx(default_session(onnx), self.feeds(), DEFAULT)),
        }

    @property
    def alone(self) -> bool:
        """Whether nothing but the file was given, so that there is nothing to compare it with."""
        return self.model is None and self.golden is None and self._samples is None

    def run(self, place: str) -> list[Arrays]:
        """Return the outputs of a place, one mapping a feed.

        Raises:
            NotCheckedError: If it cannot be run here, or does not answer the same twice.
        """
        self.require_steady(place)
        self.ran[place] = self._runs[place]()
        return self.ran[place]

    def keep(self, place: str, outputs: Sequence[Arrays]) -> None:
        """Keep outputs that a check got from a place of its own, one mapping a feed."""
        self.ran[place] = list(outputs)

    def require_steady(self, place: str) -> None:
        """Raise where a place does not answer the same twice.

        Raises:
            NotCheckedError: With the reason.
        """
        for one in (place, _STANDS_ON.get(place, place)):
            if one in self.unsteady:
                raise NotCheckedError(f"{WORDS[one]} {self.unsteady[one]}: nothing can be compared with it")

    def trained_model(self) -> nn.Module:
        """Return the trained model.

        Raises:
            NotCheckedError: If it was not given, or cannot be had here.
        """
        if self.model is None:
            raise NotCheckedError("the trained model was not given")
        return self.model()

    def reference(self) -> tuple[str, nn.Module]:
        """Return the last torch model before the file, and which place that is: the folded one where it can be had.

        Raises:
            NotCheckedError: If the trained model cannot be had.
        """
        try:
            return FOLDED, self.folded_model()
        except NotCheckedError:
            return TRAINED, self.trained_model()

    def given_inputs(self) -> list[Arrays]:
        """Return inputs to run a place with where no outputs are wanted for them: a damaged golden file is no matter.

        Raises:
            NotCheckedError: If none were given and none can be made up.
        """
        try:
            feeds = self.feeds()
        except NotCheckedError:
            raise
        except Exception:  # it fails the checks that need its outputs
            feeds = []
        return feeds or [random_feed(self.session())]

    def _feeds(self) -> list[Arrays]:
        golden = [] if self.golden is None else [self.golden().inputs]
        if self._samples is not None:
            return [*golden, *self._samples]
        return golden if golden or self.model is None else [random_feed(self.session())]

    def _torch(self, model: nn.Module) -> list[Arrays]:
        return infer(TorchRunner(model, self.session()), self.feeds())

    def _fold(self) -> nn.Module:
        model = self.trained_model()
        from torch.nn.utils import parametrize

        if not any(parametrize.is_parametrized(module) for module in model.modules()):
            raise NotCheckedError("the trained model has no parametrized weights to fold")
        from slope_compile.compression.api import fold
        from slope_compile.export.float_graph import frozen_copy

        try:
            copied = frozen_copy(model)
        except Exception as error:  # a model of anybody's: what it holds may not allow it
            raise NotCheckedError(f"the trained model cannot be copied to fold it: {reason(error)}") from None
        fold(copied)
        return copied
