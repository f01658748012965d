"""Which tensors of a model are quantized, at how many bits, and why.

| tensor | bits | where its quantizer sits |
|---|---|---|
| input of a compressed layer | the layer's activation bits | `LAYER.input_quantizer`, one for all readers of a tensor |
| residual input of an Add behind a convolution | 8 | input of the block, or output of what makes the shortcut |
| input of an average pool that nothing reads in float | 8 | `POOL.input_quantizer`, or that of the layers beside it |
| what a compressed layer returns, on request | 8 | output of the layer, or of the norm or activation behind it |
| operands of a concatenation with such an output | 8 | outputs of what makes them, one quantizer for all |

What is quantized further down all the same is not quantized twice: a max pool, a concatenation and what only moves
values commute with it. A tensor that no layer multiplies with gains nothing from fewer than 8 bits: TensorRT keeps it
in INT8 all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from slope_compile.compression.activations import INPUT, OUTPUT, ActivationQuantizer, attach
from slope_compile.compression.dataflow import Call, Dataflow, Place
from slope_compile.compression.policy import LayerPlan

STORED_BITS = 8  # of tensors that are kept or added, not multiplied
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_MOVES_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Flatten, nn.Unflatten,
)  # fmt: skip
_MOVES = (  # functions, and methods by name
    torch.cat, torch.concat, torch.concatenate, torch.flatten, torch.permute, torch.transpose, F.max_pool1d,
    F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, "flatten", "reshape", "view",
    "permute", "transpose", "contiguous",
)  # fmt: skip
_RELUS = (F.relu, F.relu6, F.leaky_relu, torch.relu, "relu", "relu_")
_FUNCTIONS = (  # activations
    *_RELUS, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh, F.hardsigmoid, F.sigmoid, F.tanh, torch.sigmoid,
    torch.tanh, torch.clamp, "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_",
)  # fmt: skip
_FROZEN_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision's and timm's
_ACTIVATIONS = frozenset({  # by name: timm has classes of its own
    "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish", "Mish",
    "Hardswish", "HardSwish", "Hardtanh", "Sigmoid", "Hardsigmoid", "HardSigmoid", "Tanh",
})  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One tensor that is quantized, or stays in float though a rule speaks of it.

    Attributes:
        modules: The modules that hold its quantizer; several where they read one tensor, or make what is concatenated.
        side: `input_quantizer` or `output_quantizer`.
        bits: 2 to 8; None: left in float.
        reason: Why.
    """

    modules: tuple[str, ...]
    side: str
    bits: int | None
    reason: str


def find_sites(model: nn.Module, rows: list[LayerPlan], outputs: bool) -> tuple[list[LayerPlan], list[Site]]:
    """Decide which tensors are quantized.

    Args:
        model: Its layers as they are before compression.
        rows: The plan of its weights; `activation_bits` says at how many bits each layer wants its input.
        outputs: Whether what layers return is quantized too.

    Returns:
        The rows, with what became of each layer's input; and the sites.
    """
    wanted = {row.name: row.activation_bits for row in rows if row.activation_bits is not None}
    if not wanted:
        return rows, []
    finder = _Finder(Dataflow(model), wanted)
    finder.residuals()
    finder.layers()
    finder.pools()
    if outputs:
        finder.outputs()
    finder.float_pools()
    finder.unknown()
    fed = {name: site for site in finder.sites if site.side == INPUT for name in site.modules} | finder.fed
    found = [_with_site(row, fed.get(row.name)) if row.name in wanted else row for row in rows]
    return found, finder.sites


def attach_sites(model: nn.Module, sites: list[Site]) -> None:
    """Give the modules of a model their quantizers.

    Raises:
        ModelError: If a module already has an attribute of a quantizer's name.
    """
    device = next(model.parameters()).device
    for site in sites:
        if site.bits is not None:
            modules = {name: model.get_submodule(name) for name in site.modules}
            attach(modules, ActivationQuantizer(site.bits, device), site.side)


class _Finder:
    """Applies one rule after the other; each sees what the earlier ones quantized."""

    def __init__(self, flow: Dataflow, wanted: Mapping[str, int]) -> None:
        self.flow, self.wanted = flow, wanted
        self.sites: list[Site] = []
        self.fed: dict[str, Site] = {}  # layer -> the site further up that already gives it what it wants
        self._quantized: dict[Place, int] = {}  # tensor -> bits, where all its readers see it quantized

    def residuals(self) -> None:
        """Quantize the shortcut of each Add whose other operand comes straight from a quantized convolution."""
        for add in self.flow.adds:
            straight = [self._straight_from_conv(place) for place in add.operands]
            if not any(straight):
                continue
            shortcut = add.operands[1] if straight[0] else add.operands[0]
            reason = f"residual input of the Add in '{add.scope}', whose other input is a convolution's"
            if shortcut in self._quantized:
                continue
            if self._is_entered_by(add.scope, shortcut):
                self._at_entry(add.scope, shortcut, reason)
            elif (maker := self.flow.maker(shortcut)) is not None:
                self._add(Site((maker,), OUTPUT, STORED_BITS, reason), shortcut)
            else:
                why = f"{reason}; left in float: no module makes or takes just this tensor"
                self.sites.append(Site((add.scope,), INPUT, None, why))

    def layers(self) -> None:
        """Quantize the input of each layer that wants it; layers that want one tensor alike share a quantizer."""
        groups: dict[tuple[Place | str, int], list[str]] = {}
        for name, bits in self.wanted.items():
            call = self.flow.only_call(name)
            place = self.flow.argument(call) if call else None
            if name in self.fed:
                continue
            if not self.flow.may_call(name):
                self.sites.append(Site((name,), INPUT, None, "left in float: the model never calls it as a module"))
                continue
            # A max pool takes some of the values: the same step quantizes it.
            groups.setdefault((self._before_pool(place) if place else name, bits), []).append(name)
        for (tensor, bits), names in groups.items():
            reason = (
                "input of a compressed layer" if len(names) == 1 else f"one input of {len(names)} compressed layers"
            )
            pools: list[str] = []
            if isinstance(tensor, tuple) and bits == STORED_BITS and (pools := self._pools_beside(tensor, names)):
                self._quantized[tensor] = bits
                reason += " and of an average pool"
            self.sites.append(Site((*names, *pools), INPUT, bits, reason))

    def _pools_beside(self, place: Place, names: list[str]) -> list[str]:
        """Return the average pools that read a tensor, where nothing but these layers reads it besides."""
        calls = [self.flow.call_at(reader) for reader in self.flow.readers(place)]
        others = [call.module for call in calls if call is not None and call.module not in names]
        if None in calls or not all(isinstance(self.flow.modules[name], _POOLS) for name in others):
            return []
        return [name for name in others if self.flow.only_call(name)] if len(set(others)) == len(others) else []

    def pools(self) -> None:
        """Quantize what average pools read, where nothing else reads it."""
        for name, place in self._pool_inputs():
            if len(self.flow.readers(place)) == 1:
                self._add(Site((name,), INPUT, STORED_BITS, "input of an average pool"), place)

    def float_pools(self) -> None:
        """Say which average pools are left."""
        for name, _ in self._pool_inputs():
            why = "input of an average pool; left in float: others read the same tensor in float"
            self.sites.append(Site((name,), INPUT, None, why))

    def _pool_inputs(self) -> Iterator[tuple[str, Place]]:
        """Yield the average pools that read a float, and what they read."""
        for name, module in self.flow.modules.items():
            call = self.flow.only_call(name) if isinstance(module, _POOLS) else None
            place = self.flow.argument(call) if call else None
            if place is not None and place not in self._quantized and place[1].op != "placeholder":
                yield name, place

    def outputs(self) -> None:
        """Quantize what layers return, behind the norm and the activation that fuse with them."""
        added = {place for add in self.flow.adds for place in add.operands if self._straight_from_conv(place)}
        found: dict[Place, Site] = {}
        for name in self.wanted:
            call = self.flow.only_call(name)
            if call is None:
                if self.flow.may_call(name):
                    why = "output of a compressed layer; left in float: who reads it is not known"
                    self.sites.append(Site((name,), OUTPUT, None, why))
                continue
            last, place = self._fused(call)
            if place in self._quantized or place in added or self.flow.is_result(place) or self._read_as_int8(place):
                continue  # INT8 already, or an operand of an Add that the convolution does itself, or the answer
            where = "" if last == name else f" of '{name}', behind what fuses with it"
            reason = f"output of a compressed layer{where}"
            if last is None:
                why = f"{reason}; left in float: a function fuses with it, and no module returns just that"
                self.sites.append(Site((name,), OUTPUT, None, why))
            elif self.flow.only_call(last):
                found[place] = Site((last,), OUTPUT, STORED_BITS, reason)
            else:
                why = f"{reason}; left in float: '{last}' is called more than once"
                self.sites.append(Site((name,), OUTPUT, None, why))
        self._concatenated(found)
        for place, site in found.items():
            self._add(site, place)

    def _concatenated(self, found: dict[Place, Site]) -> None:
        """Give all operands of a concatenation one quantizer, or none: those sites are taken out of `found`."""
        groups: list[set[Place]] = []
        for concat in self.flow.concats:
            joined = {self._before_pool(place) for place in (concat.made, *concat.operands)}
            for group in [group for group in groups if group & joined]:
                groups.remove(group)
                joined |= group
            groups.append(joined)
        made = {concat.made for concat in self.flow.concats}  # of which others are made
        for group in (group - made for group in groups):
            sites = [found.pop(place) for place in list(found) if place in group]
            if not sites:
                continue
            makers = {place: self.flow.maker(place) for place in group}
            holders = [site.modules[0] for site in sites]
            holders += [maker for maker in makers.values() if maker is not None and maker not in holders]
            if any(place in self._quantized for place in group) or len(holders) < len(group):
                for site in sites:
                    why = f"{site.reason}; left in float: what it is concatenated with cannot share its step"
                    self.sites.append(Site(site.modules, OUTPUT, None, why))
                continue
            self.sites.append(Site(tuple(holders), OUTPUT, STORED_BITS, f"{len(holders)} operands of a concatenation"))
            self._quantized |= dict.fromkeys(group, STORED_BITS)

    def _before_pool(self, place: Place) -> Place:
        """Return the tensor of which a max pool takes some values, or the tensor itself."""
        call = self.flow.call_at(place)
        while call is not None and isinstance(self.flow.modules[call.module], _MOVES_MODULES):
            before = self.flow.argument(call)
            if before is None:
                break
            place, call = before, self.flow.call_at(before)
        return place

    def unknown(self) -> None:
        """Say what could not be looked into."""
        for name, why in self.flow.opaque.items():
            inside = f"{name}." if name else ""
            if any(layer.startswith(inside) for layer in self.wanted):
                reason = f"left in float: sums and pools in its forward, which torch.fx cannot trace ({why})"
                self.sites.append(Site((name,), INPUT, None, reason))

    def _add(self, site: Site, place: Place) -> None:
        self.sites.append(site)
        self._quantized[place] = STORED_BITS

    def _is_entered_by(self, scope: str, place: Place) -> bool:
        """Return whether a tensor is the argument of a module that can hold a quantizer."""
        # nn.Sequential would run a quantizer as one of its layers.
        holds = not isinstance(self.flow.modules[scope], nn.Sequential)
        return holds and bool(scope) and self.flow.only_call(scope) is not None and place == self.flow.entry(scope)

    def _at_entry(self, scope: str, place: Place, reason: str) -> None:
        """Quantize what enters a module, for everything in it that reads it."""
        site = Site((scope,), INPUT, STORED_BITS, reason)
        self.sites.append(site)
        inside = [reader for reader in self.flow.readers(place) if _within(reader[0], scope)]
        if len(inside) == len(self.flow.readers(place)):
            self._quantized[place] = STORED_BITS
        for name, bits in self.wanted.items():
            call = self.flow.only_call(name)
            if bits == STORED_BITS and call and _within(name, scope) and self.flow.argument(call) == place:
                self.fed[name] = replace(site, reason=f"quantized where it enters '{scope}'")

    def _straight_from_conv(self, place: Place) -> bool:
        """Return whether a tensor is a quantized convolution's, with nothing but a norm between, and read once."""
        if len(self.flow.readers(place)) != 1:
            return False
        maker = self.flow.maker(place)
        if maker is not None and _is_norm(self.flow.modules[maker], activated=False):
            call = self.flow.only_call(maker)
            before = self.flow.argument(call) if call else None
            maker = None if before is None else self.flow.maker(before)
        return maker in self.wanted and not isinstance(self.flow.modules[maker], nn.Linear)

    def _fused(self, call: Call) -> tuple[str | None, Place]:
        """Return the module that returns what a layer makes, behind all that fuses with it, and that tensor.

        Norm and activation fuse; behind an activation that is a function, the module around it may return the tensor.
        """
        name, place = call.module, self.flow.output(call)
        for fuses in (_is_norm, _is_activation):
            readers = self.flow.readers(place)
            after = self.flow.call_at(readers[0]) if len(readers) == 1 else None
            if after is not None and fuses(self.flow.modules[after.module]):
                name, place = after.module, self.flow.output(after)
        readers = self.flow.readers(place)
        if len(readers) == 1 and readers[0][1].target in _FUNCTIONS:
            behind = self.flow.resolve(readers[0])
            holder = self.flow.returned_by(behind)
            if holder is not None or readers[0][1].target in _RELUS:  # no Q/DQ stands between Conv and Relu
                return holder, behind
        return name, place

    def _read_as_int8(self, place: Place) -> bool:
        """Return whether every reader of a tensor quantizes it first, also behind what commutes with that."""
        readers = self.flow.readers(place)
        holders = {name for site in self.sites if site.side == INPUT and site.bits is not None for name in site.modules}
        return place in self._quantized or (
            bool(readers) and all(self._quantizes(reader, holders) for reader in readers)
        )

    def _quantizes(self, reader: Place, holders: set[str]) -> bool:
        call = self.flow.call_at(reader)
        if call is not None and call.module in holders:
            return True
        moves = (
            reader[1].target in _MOVES if call is None else isinstance(self.flow.modules[call.module], _MOVES_MODULES)
        )
        made = self.flow.resolve(reader) if call is None else self.flow.output(call)
        return moves and self._read_as_int8(made)


def _with_site(row: LayerPlan, site: Site | None) -> LayerPlan:
    if site is None or site.bits is None:
        return replace(row, activation_bits=None, activation_reason=site.reason if site else "left in float")
    return replace(row, activation_bits=site.bits, activation_reason=site.reason)


def _is_norm(module: nn.Module, activated: bool = True) -> bool:
    """Return whether a module is a norm with constants that a convolution takes in; timm's may end in an activation."""
    if not (isinstance(module, nn.modules.batchnorm._NormBase) or type(module).__name__ in _FROZEN_NORMS):
        return False
    return activated or all(isinstance(child, nn.Identity) for child in module.children())


def _is_activation(module: nn.Module) -> bool:
    return type(module).__name__ in _ACTIVATIONS


def _within(name: str, scope: str) -> bool:
    return name == scope or name.startswith(f"{scope}." if scope else "")
