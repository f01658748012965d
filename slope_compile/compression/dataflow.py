"""Who reads which tensor in a model: torch.fx over each module's own forward, children taken as they are.

Tracing one forward at a time finds what a trace of the whole model would, and where one forward cannot be traced (it
looks at values or shapes) only the tensors inside that one stay unknown.

A tensor is known by where it is made: (module whose forward makes it, fx node). One that enters or leaves a child is
the same tensor on both sides, as long as the child is called once; so is one that passes a dropout or an identity.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

Place = tuple[str, fx.Node]  # the scope (a module's name) and the node in its graph

_ADDS = (operator.add, operator.iadd, torch.add)
_CONCATS = (torch.cat, torch.concat, torch.concatenate)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_TRANSPARENT_NAMES = ("DropPath", "StochasticDepth")  # timm's and torchvision's: the identity, but for training
_LEAVES = (nn.modules.batchnorm._NormBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Args:
        module: Name of the module that is called.
        scope: Name of the module whose forward calls it.
        node: The call.
    """

    module: str
    scope: str
    node: fx.Node


@dataclass(frozen=True)
class Add:
    """One sum of two tensors; each is given as its place, None where it is no tensor of the graph."""

    scope: str
    operands: tuple[Place, Place]


@dataclass(frozen=True)
class Concat:
    """Tensors put one behind the other; what is made and what it is made of are given as their places."""

    made: Place
    operands: tuple[Place, ...]


class Dataflow:
    """The tensors of a model that its modules hand to one another.

    Args:
        model: With plain layers: no parametrization, no hooks.

    Attributes:
        calls: Every call of a module that was seen.
        adds: Every sum of two tensors that was seen.
        concats: Every concatenation of a list of tensors that was seen.
        opaque: Module whose forward cannot be traced -> why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.calls: list[Call] = []
        self.opaque: dict[str, str] = {}
        self._graphs: dict[str, fx.Graph] = {}
        for name, module in self.modules.items():
            if _has_forward_of_its_own(module):
                self._trace(name, module)
        self.count = Counter(call.module for call in self.calls)
        self._only = {call.module: call for call in self.calls if self.count[call.module] == 1}
        self.adds = [
            Add(scope, (self.resolve((scope, node.args[0])), self.resolve((scope, node.args[1]))))
            for scope, graph in self._graphs.items()
            for node in graph.nodes
            if _is_add(node)
        ]
        self.concats = [
            Concat(self.resolve((scope, node)), tuple(self.resolve((scope, one)) for one in node.args[0]))
            for scope, graph in self._graphs.items()
            for node in graph.nodes
            if _is_concat(node)
        ]
        self._at = {(call.scope, call.node): call for call in self.calls}
        self._readers: dict[Place, list[Place]] = {}
        self._collect_readers()

    def only_call(self, module: str) -> Call | None:
        """Return the call of a module that is called exactly once, else None."""
        return self._only.get(module)

    def call_at(self, reader: Place) -> Call | None:
        """Return the call that a reader of a tensor is, None if it is no call of a module."""
        return self._at.get(reader)

    def may_call(self, module: str) -> bool:
        """Return whether a module is called, or some forward that could call it is unknown."""
        if self.count[module]:
            return True
        parts = module.split(".")
        return any(".".join(parts[:depth]) in self.opaque for depth in range(len(parts)))

    def argument(self, call: Call) -> Place | None:
        """Return the first argument of a call, None if it is no tensor of the graph."""
        first = call.node.args[0] if call.node.args else next(iter(call.node.kwargs.values()), None)
        return self.resolve((call.scope, first)) if isinstance(first, fx.Node) else None

    def output(self, call: Call) -> Place:
        """Return what a call makes."""
        return self.resolve((call.scope, call.node))

    def readers(self, place: Place) -> list[Place]:
        """Return the nodes that read a tensor, with their scopes, but for those that only hand it on."""
        return self._readers.get(place, [])

    def entry(self, module: str) -> Place | None:
        """Return the tensor that a traced module gets as its first argument, None if it is traced nowhere."""
        graph = self._graphs.get(module)
        first = next((node for node in graph.nodes if node.op == "placeholder"), None) if graph else None
        return None if first is None else self.resolve((module, first))

    def maker(self, place: Place) -> str | None:
        """Return the name of the module that makes a tensor, called once; None for anything else."""
        scope, node = place
        if node.op != "call_module":
            return None
        name = _join(scope, str(node.target))
        return name if self.count[name] == 1 else None

    def returned_by(self, place: Place) -> str | None:
        """Return the name of the module, called once, whose own forward makes a tensor and returns it; else None."""
        scope, node = place
        alone = bool(scope) and self.count[scope] == 1 and not isinstance(self.modules[scope], nn.Sequential)
        return scope if alone and _returned(self._graphs[scope]) is node else None

    def is_result(self, place: Place) -> bool:
        """Return whether the model itself returns this tensor."""
        graph = self._graphs.get("")
        answer = _returned(graph) if graph else None
        return answer is not None and self.resolve(("", answer)) == place

    def resolve(self, place: Place) -> Place:
        """Return where a tensor is really made."""
        while (before := self._before(place)) is not None:
            place = before
        return place

    def _before(self, place: Place) -> Place | None:
        """Return one step towards where a tensor is made: into a child that returns it, or out to who gave it."""
        scope, node = place
        if node.op == "call_module":
            name = _join(scope, str(node.target))
            if _is_transparent(self.modules[name]):
                return (scope, node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
            graph = self._graphs.get(name)
            answer = _returned(graph) if graph and self.count[name] == 1 else None
            return None if answer is None else (name, answer)
        if node.op == "placeholder" and scope in self._only and node is _first_placeholder(self._graphs[scope]):
            call = self._only[scope]
            first = call.node.args[0] if call.node.args else None
            return (call.scope, first) if isinstance(first, fx.Node) else None
        return None

    def _trace(self, name: str, module: nn.Module) -> None:
        try:
            graph = _Shallow().trace(module, concrete_args=_defaults(module))
        except Exception as error:  # tracing runs the model's own code with stand-ins for tensors: anything may happen
            text = " ".join(str(error).split())
            self.opaque[name] = f"{type(error).__name__}: {text[:120].rstrip('. ')}"
            return
        self._graphs[name] = graph
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls.append(Call(_join(name, str(node.target)), name, node))

    def _collect_readers(self) -> None:
        for scope, graph in self._graphs.items():
            for node in graph.nodes:
                for source in node.all_input_nodes:
                    if not self._hands_on(scope, node):
                        self._readers.setdefault(self.resolve((scope, source)), []).append((scope, node))

    def _hands_on(self, scope: str, node: fx.Node) -> bool:
        """Return whether a node reads a tensor only for others to read it."""
        if node.op == "output":
            return scope in self._only
        if node.op != "call_module":
            return False
        name = _join(scope, str(node.target))
        return _is_transparent(self.modules[name]) or (name in self._graphs and self.count[name] == 1)


class _Shallow(fx.Tracer):
    """Traces one forward: every child is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _has_forward_of_its_own(module: nn.Module) -> bool:
    """Return whether a module hands tensors to children of its own."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward:
        return False
    return any(True for _ in module.children()) and not isinstance(module, _LEAVES)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Return the arguments that have defaults: `if mask is not None` must see None, not a stand-in."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _is_add(node: fx.Node) -> bool:
    named = node.op == "call_method" and node.target in ("add", "add_")
    summed = node.op == "call_function" and node.target in _ADDS
    return (named or summed) and len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)


def _is_concat(node: fx.Node) -> bool:
    listed = node.op == "call_function" and node.target in _CONCATS and len(node.args) > 0
    first = node.args[0] if listed else None
    return isinstance(first, list | tuple) and all(isinstance(one, fx.Node) for one in first)


def _is_transparent(module: nn.Module) -> bool:
    return isinstance(module, _TRANSPARENT) or type(module).__name__ in _TRANSPARENT_NAMES


def _returned(graph: fx.Graph) -> fx.Node | None:
    """Return the one tensor that a forward returns."""
    answer = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return answer if isinstance(answer, fx.Node) else None


def _first_placeholder(graph: fx.Graph) -> fx.Node | None:
    return next((node for node in graph.nodes if node.op == "placeholder"), None)


def _join(scope: str, name: str) -> str:
    return f"{scope}.{name}" if scope else name
