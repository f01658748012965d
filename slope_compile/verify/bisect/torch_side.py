"""A torch model, its layers' inputs and outputs to be had through hooks."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from slope_compile.qdq.sites import Levels
from slope_compile.verify.bisect.points import Key
from slope_compile.verify.chain.runners import Array, Arrays, evaluated, tensors_of

if TYPE_CHECKING:
    from torch import Tensor, nn

Keep = Callable[[Key, "Tensor"], None]


class TorchSide:
    """A torch model in evaluation mode, left as it was.

    Args:
        model: Takes the inputs by position. A detector of torchvision is run in the form that is exported.
        inputs: Names of the inputs in the order of the model's arguments; None: that of the feed.
    """

    free_batch = True

    def __init__(self, model: nn.Module, inputs: Sequence[str] | None = None) -> None:
        self.model, self._inputs = model, inputs
        self._forms: dict[tuple[int, ...], nn.Module] = {}

    def keys(self, feed: Arrays) -> dict[Key, int | None]:
        """Run it and return the tensors that its layers, norms and quantizers read and make, with bytes as float32."""
        found: dict[Key, int | None] = {}
        self._run(feed, lambda key, tensor: found.__setitem__(key, 4 * tensor.numel()))
        return found

    def values(self, feed: Arrays, keys: Iterable[Key]) -> dict[Key, Array]:
        """Run it and return some tensors."""
        wanted, found = set(keys), dict[Key, Array]()

        def keep(key: Key, tensor: Tensor) -> None:
            if key in wanted:
                found[key] = _numpy(tensor)

        self._run(feed, keep)
        return found

    def length(self, layer: str) -> int:
        """Return K of a layer; 0 for what is no layer."""
        from torch import nn

        module = self.module(layer)
        if isinstance(module, nn.Linear):
            return module.in_features
        if not isinstance(module, nn.modules.conv._ConvNd):
            return 0
        return math.prod(module.kernel_size) * module.in_channels // module.groups

    def operator(self, layer: str) -> str:
        """Return the class of a layer: Conv2d, Linear, BatchNorm2d, ..."""
        return type(self.module(layer)).__name__.removeprefix("Parametrized")

    def onnx_operator(self, layer: str) -> str | None:
        """Return which operator of ONNX a layer is, Conv or MatMul; None for others, and for padding with no zeros."""
        from torch import nn

        module = self.module(layer)
        if isinstance(module, nn.Linear):
            return "MatMul"
        plain = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not isinstance(module.padding, str)
        return "Conv" if plain and module.padding_mode == "zeros" else None

    def levels(self) -> Mapping[str, Levels]:
        """Return its quantizers of activations by name."""
        from slope_compile.compression.activations import trained_quantizers

        return trained_quantizers(self.model)

    def results(self, feed: Arrays) -> list[Array]:
        """Run it and return its outputs."""
        found: list[Array] = []

        def keep(key: Key, tensor: Tensor) -> None:
            if key.role == "result":
                found.append(_numpy(tensor))

        self._run(feed, keep)
        return found

    def alone(self, key: Key, given: Array) -> Array | None:
        """Return what a layer makes of an input, given for its only argument; None if it takes more."""
        import torch
        from torch.nn.utils import parametrize

        made: list[Tensor] = []
        module = self.module(key.name)
        with evaluated(self.model), torch.inference_mode(), parametrize.cached():
            where = next(iter(module.parameters()), torch.empty(0)).device
            handle = module.register_forward_hook(lambda _m, _a, output: made.append(output), prepend=True)
            try:
                module(torch.as_tensor(given).to(where))
            except TypeError:
                return None
            finally:
                handle.remove()
        return _numpy(made[0])

    def module(self, name: str) -> nn.Module:
        """Return a layer by its name."""
        return self.model.get_submodule(name)

    def _run(self, feed: Arrays, keep: Keep) -> None:
        import torch
        from torch.nn.utils import parametrize

        names = list(feed) if self._inputs is None else self._inputs
        where = next(iter(self.model.parameters()), torch.empty(0)).device
        arguments = [torch.as_tensor(np.asarray(feed[name])).to(where) for name in names]
        with evaluated(self.model):
            form = self._form(tuple(arguments[0].shape[1:]))
            with torch.inference_mode(), parametrize.cached(), _hooked(form, keep):
                answer = form(*arguments)
        for index, tensor in enumerate(tensors_of(answer)):
            keep(Key(str(index), "result"), tensor)

    def _form(self, shape: tuple[int, ...]) -> nn.Module:
        from slope_compile.export.detection import graph_form

        if shape not in self._forms:
            self._forms[shape] = graph_form(self.model, shape).eval()
        return self._forms[shape]


def layer_names(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers and norms of a model by the name of their weight without `.weight`.

    Layers that share one weight have the name of the first module that holds it, as the exported initializer has.
    """
    from torch import nn

    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@contextmanager
def _hooked(model: nn.Module, keep: Keep) -> Iterator[None]:
    """Hand what layers, norms and quantizers read and make to `keep` while the model runs."""
    from slope_compile.compression.activations import activation_quantizers

    calls: Counter[str] = Counter()
    handles: list[Any] = []
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = _own_weight(module)
        if weight is not None:
            first.setdefault(id(weight), name)
    try:
        for name, module in layer_names(model).items():
            weight = _own_weight(module)
            shared = name if weight is None else first[id(weight)]
            handles += _watch_layer(module, shared, calls, keep)
        for name, quantizer in activation_quantizers(model):
            handles.append(quantizer.register_forward_hook(_watch_quantizer(name, calls, keep)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_layer(module: nn.Module, name: str, calls: Counter[str], keep: Keep) -> list[Any]:
    from torch import Tensor, nn

    role: Any = "product" if isinstance(module, nn.Linear) and module.bias is None else "output"

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = [*arguments, *named.values()]
        if given and isinstance(given[0], Tensor):
            keep(Key(name, "input", calls[name]), given[0])

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            keep(Key(name, role, calls[name]), output)
        calls[name] += 1

    # The input as the layer sees it, behind its quantizer; the output before one.
    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, prepend=True),
    ]


def _watch_quantizer(name: str, calls: Counter[str], keep: Keep) -> Callable[..., None]:
    from slope_compile.compression.lsq import effective_step

    read: list[weakref.ref[Any]] = []

    def after(quantizer: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        # Layers that share a quantizer hand it the same tensor: the file quantizes that once.
        if any(other() is arguments[0] for other in read):
            return
        read.append(weakref.ref(arguments[0]))
        call = calls[f"{name}:quantizer"]
        calls[f"{name}:quantizer"] += 1
        keep(Key(name, "read", call), arguments[0])
        import torch

        keep(Key(name, "quantizer", call), (output / effective_step(quantizer.step)).round().to(torch.int8))

    return after


def _own_weight(module: nn.Module) -> Any:
    """Return the parameter behind a module's weight, a compressed one's latent; None where there is none."""
    from torch.nn.utils import parametrize

    if parametrize.is_parametrized(module, "weight"):
        chain: Any = module.parametrizations
        return chain["weight"].original
    return module._parameters.get("weight")


def _numpy(tensor: Tensor) -> Array:
    """Return a copy on the host, floats as float32: an activation function may overwrite the tensor in place."""
    array = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return np.array(array.cpu().numpy(), copy=True)
