"""Why a torch model answers differently to the same input: what it calls while it runs, and in which module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode


def random_causes(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Return the modules that draw random numbers, with the operation that draws them, in the order of the calls.

    Args:
        model: In the mode that it is to be run in.
        run: Runs it once.
    """
    with _watched(model, _draws) as found:
        run()
    return [f"{_where(model, name)} draws random numbers ({operation})" for name, operation in found.items()]


def batch_causes(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Return the modules that normalize with the statistics of the batch they are given.

    Args:
        model: As of `random_causes`.
        run: As of `random_causes`.
    """
    with _watched(model, _takes_batch_statistics) as found:
        run()
    modules = dict(model.named_modules())
    # An instance norm is computed as a batch norm whose batch is one sample: that is what it should do.
    told = {name: operation for name, operation in found.items() if not isinstance(modules.get(name), _InstanceNorm)}
    return [f"{_where(model, name)} normalizes with the batch's own statistics ({op})" for name, op in told.items()]


def state_causes(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Return the modules that keep something from one call to the next, with what they keep, in the model's order.

    Args:
        model: As of `random_causes`.
        run: As of `random_causes`.
    """
    before, found = [dict[str, Any]()], list[str]()

    def remember(*_: object) -> None:
        before[0] = {place: _copied(value) for place, value in _kept(model)}

    def look(*_: object) -> None:
        for place, value in _kept(model):
            if place in before[0] and not _equal(before[0][place], value):
                module, name = place.rsplit(".", 1)
                found.append(f"{_where(model, module)} changes its '{name}' with each call")

    handles = [model.register_forward_pre_hook(remember), model.register_forward_hook(look, always_call=True)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(found))


def _kept(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the buffers of all modules and the tensors and numbers among their attributes, by their place."""
    for name, module in model.named_modules():
        for own, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, torch.Tensor | int | float):
                yield f"{name}.{own}", value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b.to(a.device)))
    return type(a) is type(b) and a == b


def _where(model: nn.Module, name: str) -> str:
    return f"module '{name}'" if name else f"the forward of {type(model).__name__}"


@contextmanager
def _watched(model: nn.Module, wanted: Callable[[Any, tuple[Any, ...]], bool]) -> Iterator[dict[str, str]]:
    """Collect module -> the first operation in it that is `wanted`, while the model runs."""
    inside: list[str] = [""]
    found: dict[str, str] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if wanted(func, args):
                found.setdefault(inside[-1], str(func))
            return func(*args, **(kwargs or {}))

    def leave(*_: object) -> None:
        inside.pop()

    handles = []
    for name, module in model.named_modules():

        def enter(*_: object, name: str = name) -> None:
            inside.append(name)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        with Watch():
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _draws(func: Any, args: tuple[Any, ...]) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _takes_batch_statistics(func: Any, args: tuple[Any, ...]) -> bool:
    if "batch_norm" not in str(func):
        return False
    names = [argument.name for argument in func._schema.arguments]
    return any(value is True for name, value in zip(names, args, strict=False) if name in ("training", "train"))
