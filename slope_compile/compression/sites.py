"""Which tensors of a model are quantized, at how many bits, and why.

| tensor | bits | where its quantizer sits |
|---|---|---|
| input of a compressed layer | the layer's activation bits | `LAYER.input_quantizer`, one for all readers of a tensor |
| residual input of an Add behind a convolution | 8 | input of the block, or output of what makes the shortcut |
| input of an average pool that nothing else reads | 8 | `POOL.input_quantizer` |
| what a compressed layer returns, on request | 8 | output of the layer, or of the norm or activation behind it |

A tensor that no layer multiplies with gains nothing from fewer than 8 bits: TensorRT keeps it in INT8 all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from slope_compile.compression.activations import INPUT, OUTPUT, ActivationQuantizer, attach
from slope_compile.compression.dataflow import Call, Dataflow, Place
from slope_compile.compression.policy import LayerPlan

STORED_BITS = 8  # of tensors that are kept or added, not multiplied
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_FROZEN_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision's and timm's
_ACTIVATIONS = frozenset({  # by name: timm has classes of its own
    "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish", "Mish",
    "Hardswish", "HardSwish", "Hardtanh", "Sigmoid", "Hardsigmoid", "HardSigmoid", "Tanh",
})  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One tensor that is quantized, or stays in float though a rule speaks of it.

    Attributes:
        modules: The modules that hold its quantizer; several where they read one tensor.
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
    if outputs:
        finder.outputs()
    finder.pools()
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
        groups: dict[tuple[object, int], list[str]] = {}
        for name, bits in self.wanted.items():
            call = self.flow.only_call(name)
            place = self.flow.argument(call) if call else None
            if name in self.fed:
                continue
            if not self.flow.may_call(name):
                self.sites.append(Site((name,), INPUT, None, "left in float: the model never calls it as a module"))
                continue
            groups.setdefault((place or name, bits), []).append(name)
        for (_, bits), names in groups.items():
            reason = (
                "input of a compressed layer" if len(names) == 1 else f"one input of {len(names)} compressed layers"
            )
            self.sites.append(Site(tuple(names), INPUT, bits, reason))

    def pools(self) -> None:
        """Quantize what average pools read, where nothing else reads it."""
        for name, module in self.flow.modules.items():
            if not isinstance(module, _POOLS):
                continue
            call = self.flow.only_call(name)
            place = self.flow.argument(call) if call else None
            if place is None or place in self._quantized or place[1].op == "placeholder":
                continue
            if len(self.flow.readers(place)) > 1:
                why = "input of an average pool; left in float: others read the same tensor in float"
                self.sites.append(Site((name,), INPUT, None, why))
            else:
                self._add(Site((name,), INPUT, STORED_BITS, "input of an average pool"), place)

    def outputs(self) -> None:
        """Quantize what layers return, behind the norm and the activation that fuse with them."""
        added = {place for add in self.flow.adds for place in add.operands if self._straight_from_conv(place)}
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
            if self.flow.only_call(last):
                self._add(Site((last,), OUTPUT, STORED_BITS, reason), place)
            else:
                why = f"{reason}; left in float: '{last}' is called more than once"
                self.sites.append(Site((name,), OUTPUT, None, why))

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

    def _fused(self, call: Call) -> tuple[str, Place]:
        """Return the last module that fuses with a layer (its norm, its activation), and what that one returns."""
        name, place = call.module, self.flow.output(call)
        for fuses in (_is_norm, _is_activation):
            readers = self.flow.readers(place)
            after = self.flow.call_at(readers[0]) if len(readers) == 1 else None
            if after is not None and fuses(self.flow.modules[after.module]):
                name, place = after.module, self.flow.output(after)
        return name, place

    def _read_as_int8(self, place: Place) -> bool:
        """Return whether every reader of a tensor quantizes it first."""
        readers = self.flow.readers(place)
        holders = {name for site in self.sites if site.side == INPUT and site.bits is not None for name in site.modules}
        calls = [self.flow.call_at(reader) for reader in readers]
        return bool(calls) and all(call is not None and call.module in holders for call in calls)


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
