"""Which channels of a model may change places without changing what it computes.

A space is a set of channels that keep one order wherever they go: what a convolution or linear layer puts out, merged
with what it is added to, followed through whatever treats channels one by one. torch.fx traces the graph, which must
be the same for every input; shapes are those of batches, [n, c, h, w] after a Conv2d. What is not understood freezes
the spaces that it sees, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from slope_compile.compression import channelwise
from slope_compile.compression.spaces import Channels, Slice, Space


class NotTraceableError(Exception):
    """The model's graph depends on its input, or a part of it is not in the graph; the message says what."""


def read_spaces(model: nn.Module) -> tuple[list[Space], dict[str, str]]:
    """Find the spaces of a model, in the order of the graph.

    Returns:
        The spaces, and for convolution and linear layers whose input belongs to none: layer name -> why.

    Raises:
        NotTraceableError: If the graph cannot be had.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout and the like vanish; the parameters in use are the same, which is checked
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises on meeting a symbol
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotTraceableError(f"{type(model).__name__} cannot be traced: {line.rstrip('.')}") from error
    finally:
        for module, training in modes:
            module.training = training
    reader = _Reader(model, graph)
    reader.read()
    return list(dict.fromkeys(space.root() for space in reader.spaces)), reader.unfed


class _Tracer(fx.Tracer):
    """Traces into containers; layers, and modules that cannot be traced, stay one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)) or parametrize.is_parametrized(m)
        known = layer or channelwise.is_handled(m) or channelwise.is_spatial(m)
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # its code asks for a value that a symbol does not have
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class _Reader:
    """Walks the graph once, node by node.

    Args:
        model: The model.
        graph: Its graph.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.modules = dict(model.named_modules())
        self.values: dict[fx.Node, Channels | None] = {}
        self.calls: dict[str, tuple[Channels | None, Channels | None]] = {}  # first call: what came in and went out
        self.spaces: list[Space] = []
        self.unfed: dict[str, str] = {}
        self.foreign = self._foreign()

    def read(self) -> None:
        """Fill `spaces` and `unfed`.

        Raises:
            NotTraceableError: If a module with parameters takes no part in the graph.
        """
        for node in self.graph.nodes:
            self.values[node] = self._value(node)

    def _foreign(self) -> set[int]:
        """Return the ids of parameters used otherwise than by one layer's own call; prove that the graph has all."""
        owners: dict[int, int] = {}
        for module in self.modules.values():
            for parameter in module._parameters.values():
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        foreign = {key for key, count in owners.items() if count > 1}
        seen: set[int] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                owner, _, leaf = str(node.target).rpartition(".")
                foreign.add(id(getattr(self.modules[owner], leaf)))
            elif node.op == "call_module":
                seen |= {id(parameter) for parameter in self.modules[node.target].parameters()}
                inner = list(self.modules[node.target].children())
                if inner and not channelwise.is_handled(self.modules[node.target]):
                    foreign |= {id(parameter) for parameter in self.modules[node.target].parameters()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in seen | foreign:
                raise NotTraceableError(f"'{name}' takes no part in the graph of {type(self.model).__name__}")
        return foreign

    def _value(self, node: fx.Node) -> Channels | None:
        if node.op == "call_module":
            return self._call(node)
        if node.op in ("call_function", "call_method"):
            return self._operation(node)
        if node.op == "output":
            self._freeze(self._inputs(node), "it is what the model returns")
        return None

    def _call(self, node: fx.Node) -> Channels | None:
        name, module = str(node.target), self.modules[str(node.target)]
        given = self._inputs(node)
        x = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if len(given) > 1 or (given and x is None):
            return self._barrier(given, f"{type(module).__name__} '{name}' reads it")
        if channelwise.is_elementwise(module):
            return x
        if channelwise.is_spatial(module):
            return self._spatial(x, f"{type(module).__name__} '{name}'")
        if isinstance(module, nn.Flatten):
            whole = (module.start_dim, module.end_dim) == (1, -1)
            return self._flatten(x) if whole else self._barrier(given, f"Flatten '{name}' reads it")
        if not channelwise.is_handled(module):
            return self._barrier(given, f"{type(module).__name__} '{name}' mixes channels", name)
        if any(id(parameter) in self.foreign for parameter in module.parameters()) or channelwise.is_hooked(module):
            why = "shares parameters with others, or is not called as a whole"
            return self._barrier(given, f"'{name}' {why}", name)
        if name in self.calls:
            return self._again(name, x)
        out = self._first_call(name, module, x)
        self.calls[name] = (x, out)
        return out

    def _first_call(self, name: str, module: nn.Module, x: Channels | None) -> Channels | None:
        if isinstance(module, _ConvNd):
            return self._conv(name, module, x)
        if isinstance(module, nn.Linear):
            return self._linear(name, module, x)
        if channelwise.is_norm(module):
            return self._norm(name, module, x)
        self._attention(name, module)
        return self._barrier([] if x is None else [x], f"attention '{name}' mixes channels")

    def _again(self, name: str, x: Channels | None) -> Channels | None:
        """Call a layer a second time: what it reads and returns has the order that it had the first time."""
        before, out = self.calls[name]
        if before is None and x is None:
            return out
        if before is None or x is None or self._unified(before, x) is None:
            self._freeze([v for v in (before, x, out) if v], f"'{name}' is called with different inputs")
        return out

    def _conv(self, name: str, conv: _ConvNd, x: Channels | None) -> Channels | None:
        rank = conv.weight.dim()
        if x is not None and (x.axis, x.rank, x.flat, x.width) != (1, rank, False, conv.in_channels):
            x = self._barrier([x], f"the input of '{name}' has other axes")
        if conv.groups > 1 and conv.weight.shape[1] == 1:
            each = conv.out_channels // conv.groups
            if x is None:
                self.unfed[name] = "its input is not followed"
                return None
            parts = tuple((space, repeat * each) for space, repeat in x.parts)
            return self._follow(Channels(parts, 1, rank), [(conv.weight, 0), (conv.bias, 0)])
        self._reads(name, conv.weight, x, conv.groups)
        return self._makes(conv, conv.out_channels, 1, rank, conv.groups)

    def _linear(self, name: str, linear: nn.Linear, x: Channels | None) -> Channels:
        rank, repeat = None, 1
        if x is not None:
            rank = x.rank
            last = x.axis == -1 or x.rank == 2
            repeat, rest = divmod(linear.in_features, x.width)
            if not last or rest or (repeat > 1 and not x.flat):
                x = self._barrier([x], f"the input of '{name}' has other axes")
        if x is not None:
            x = Channels(tuple((space, times * repeat) for space, times in x.parts), -1, x.rank)
        self._reads(name, linear.weight, x, 1)
        return self._makes(linear, linear.out_features, 1 if rank == 2 else -1, rank, 1)

    def _reads(self, name: str, weight: Tensor, x: Channels | None, groups: int) -> None:
        """Note a layer that sums over the channels of x."""
        if x is None:
            self.unfed[name] = "its input is not the output of layers that are followed"
            return
        if groups > 1:
            if len(x.parts) > 1 or x.parts[0][1] > 1:
                self._barrier([x], f"grouped convolution '{name}' reads a concatenation", name)
                return
            x.parts[0][0].divide(groups)
        offset = 0
        for space, repeat in x.parts:
            piece = Slice(weight, 1, offset, repeat, groups)
            root = space.root()
            root.slices.append(piece)
            root.readers.append((name, piece))
            offset += space.size * repeat

    def _makes(self, layer: nn.Module, size: int, axis: int, rank: int | None, groups: int) -> Channels:
        space = Space(size, groups)
        self.spaces.append(space)
        out = Channels(((space, 1),), axis, rank)
        return self._follow(out, [(layer.weight, 0), (layer.bias, 0)])  # type: ignore[list-item]

    def _follow(self, x: Channels, tensors: Iterable[tuple[Tensor | None, int]]) -> Channels:
        """Let tensors run along with the channels of x."""
        offset = 0
        for space, repeat in x.parts:
            pieces = [Slice(tensor, axis, offset, repeat) for tensor, axis in tensors if tensor is not None]
            space.root().slices += pieces
            offset += space.size * repeat
        return x

    def _norm(self, name: str, norm: nn.Module, x: Channels | None) -> Channels | None:
        if x is None:
            return None
        tensors = [getattr(norm, key, None) for key in ("weight", "bias", "running_mean", "running_var")]
        known = next((len(tensor) for tensor in tensors if tensor is not None), x.width)
        if x.axis != 1 or x.flat or known != x.width:
            return self._barrier([x], f"the input of '{name}' has other axes")
        return self._follow(x, [(tensor, 0) for tensor in tensors])

    def _attention(self, name: str, attention: nn.Module) -> None:
        """Free the values of each head: rows of the last third of qkv, columns of proj."""
        qkv, proj, heads = channelwise.attention_parts(attention)
        space = Space(proj.in_features, heads)
        self.spaces.append(space)
        space.slices += [Slice(t, 0, 2 * space.size) for t in (qkv.weight, qkv.bias) if t is not None]
        self._reads(f"{name}.proj", proj.weight, Channels(((space, 1),), -1, None), 1)
        self.unfed[f"{name}.qkv"] = "its input is not the output of layers that are followed"

    def _operation(self, node: fx.Node) -> Channels | None:
        given = self._inputs(node)
        if not given or channelwise.reads_shape_only(node):
            return None
        kind = channelwise.operation_kind(node)
        what = f"{channelwise.operation_name(node)} reads it"
        x = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if kind == "binary":
            return self._binary(node, what)
        if kind == "cat":
            return self._cat(node, what)
        if x is None or len(given) > 1:
            return self._barrier(given, what)
        if kind == "elementwise":
            return x
        if kind == "spatial":
            return self._spatial(x, what)
        if kind == "flatten":
            return self._flatten(x)
        if kind == "mean" and x.axis == 1 and x.rank == 4 and not x.flat:
            return Channels(x.parts, 1, 4 if channelwise.keeps_axes(node) else 2)
        return self._barrier(given, what)

    def _binary(self, node: fx.Node, what: str) -> Channels | None:
        sides = [self.values.get(a) if isinstance(a, fx.Node) else a for a in node.args[:2]]
        known = [side for side in sides if isinstance(side, Channels)]
        if len(known) == 1 and any(isinstance(side, (int, float)) for side in sides):
            return known[0]
        if len(known) == 2 and (out := self._unified(*known)) is not None:
            return out
        return self._barrier(known, what)

    def _cat(self, node: fx.Node, what: str) -> Channels | None:
        items = node.args[0] if isinstance(node.args[0], (list, tuple)) else ()
        values = [self.values.get(item) if isinstance(item, fx.Node) else None for item in items]
        known = [value for value in values if value is not None]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        first = known[0]
        alike = all((v.axis, v.rank, v.flat) == (1, first.rank, False) for v in known) and first.rank is not None
        if len(known) < len(values) or not alike or axis not in (1, 1 - (first.rank or 0)):
            return self._barrier(self._inputs(node), what)
        return Channels(tuple(part for value in known for part in value.parts), 1, first.rank)

    def _spatial(self, x: Channels | None, what: str) -> Channels | None:
        if x is None or (x.axis == 1 and x.rank is not None and x.rank > 2 and not x.flat):
            return x
        return self._barrier([x], what)

    def _flatten(self, x: Channels | None) -> Channels | None:
        if x is None or x.rank == 2:
            return x
        if x.axis != 1 or x.rank is None or x.flat:
            return self._barrier([x], "flatten reads it")
        return Channels(x.parts, 1, 2, flat=True)

    def _unified(self, a: Channels, b: Channels) -> Channels | None:
        """Give two tensors that are added or multiplied one order; None where their channels do not match."""
        if (a.axis, a.rank) != (b.axis, b.rank) or a.flat or b.flat:
            return None
        if [(s.size, r) for s, r in a.parts] != [(s.size, r) for s, r in b.parts]:
            return None
        for (one, _), (other, _) in zip(a.parts, b.parts, strict=True):
            one.merge(other)
        return a

    def _inputs(self, node: fx.Node) -> list[Channels]:
        return [value for given in node.all_input_nodes if (value := self.values.get(given)) is not None]

    def _barrier(self, given: Iterable[Channels], reason: str, layer: str | None = None) -> Channels | None:
        """Freeze what comes in; nothing is known of what goes out."""
        self._freeze(given, reason)
        if layer is not None:
            self.unfed[layer] = reason
        return None

    def _freeze(self, given: Iterable[Channels], reason: str) -> None:
        for space in _spaces(given):
            space.freeze(reason)


def _spaces(values: Iterable[Channels]) -> Iterator[Space]:
    for value in values:
        for space, _ in value.parts:
            yield space
