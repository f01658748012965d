"""What treats channels one by one: the modules and operations that the search for free channels may walk through.

A list of what is known, by exact type or name: a subclass may do something else. Classes of torchvision and timm are
known by name, because this package imports neither.
"""

from __future__ import annotations

from typing import Literal

from torch import fx, nn

Kind = Literal["elementwise", "binary", "cat", "spatial", "flatten", "mean", "other"]

_ELEMENTWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU),
    *(nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh),
    *(nn.Softplus, nn.Softsign, nn.LogSigmoid),
)
_SPATIAL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d),
)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.PReLU)
_LAYERS_BY_NAME = ("Conv2dSame", "Linear")
_SPATIAL_BY_NAME = ("MaxPool2dSame", "AvgPool2dSame")
_NORMS_BY_NAME = ("FrozenBatchNorm2d", "BatchNormAct2d", "FrozenBatchNormAct2d")

_KINDS: dict[Kind, frozenset[str]] = {
    "elementwise": frozenset(
        (
            *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
            *("hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus", "logsigmoid", "dropout", "dropout1d"),
            *("dropout2d", "dropout3d", "clamp", "clamp_", "abs", "square", "neg", "exp", "sqrt", "contiguous"),
            *("clone", "float", "half", "bfloat16"),
        )
    ),
    "binary": frozenset(
        (
            *("add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "div", "div_", "truediv"),
            *("itruediv", "pow", "maximum", "minimum"),
        )
    ),
    "cat": frozenset(("cat", "concat", "concatenate")),
    "spatial": frozenset(
        (
            *("max_pool1d", "max_pool2d", "max_pool3d", "_max_pool1d", "_max_pool2d", "_max_pool3d", "avg_pool1d"),
            *("avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
            "interpolate",
        )
    ),
}
_SHAPE_METHODS = ("size", "dim", "numel", "ndimension")
_SHAPE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_LIBRARY = (None, "torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "_operator", "builtins")


def _is_library(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Return whether a module is one of torchvision's or timm's of these names."""
    return type(module).__name__ in names and type(module).__module__.startswith(("timm.", "torchvision."))


def is_elementwise(module: nn.Module) -> bool:
    """Return whether a module treats every element by itself."""
    return type(module) in _ELEMENTWISE


def is_spatial(module: nn.Module) -> bool:
    """Return whether a module works on the axes behind the channels, on each channel alike."""
    known = type(module) in _SPATIAL or _is_library(module, _SPATIAL_BY_NAME)
    return known and not getattr(module, "return_indices", False)


def is_plain_layer(module: nn.Module) -> bool:
    """Return whether a module is a convolution or linear layer as torch has it."""
    return type(module) in _LAYERS or _is_library(module, _LAYERS_BY_NAME)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module has one factor, shift and statistic a channel and uses nothing else."""
    inner = all(is_elementwise(child) for child in module.children())
    return type(module) in _NORMS or (_is_library(module, _NORMS_BY_NAME) and inner)


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is timm's attention with one matrix for q, k, v, and nothing that mixes heads' values."""
    if not _is_library(module, ("Attention",)):
        return False
    qkv, proj, norm = (getattr(module, name, None) for name in ("qkv", "proj", "norm"))
    if type(qkv) is not nn.Linear or type(proj) is not nn.Linear or type(norm) is not nn.Identity:
        return False
    return qkv.out_features == 3 * proj.in_features and getattr(module, "gate", None) is None


def attention_parts(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, int]:
    """Return qkv, proj and the number of heads of an `is_attention` module."""
    qkv, proj, heads = attention.qkv, attention.proj, attention.num_heads
    assert isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)  # is_attention
    return qkv, proj, int(heads)  # type: ignore[arg-type]


def is_handled(module: nn.Module) -> bool:
    """Return whether the parameters of a module may be reordered."""
    return is_plain_layer(module) or is_norm(module) or is_attention(module)


def is_hooked(module: nn.Module) -> bool:
    """Return whether something else runs before or after a module or a part of it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def operation_name(node: fx.Node) -> str:
    """Return what an operation is called: "add", "flatten"."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def reads_shape_only(node: fx.Node) -> bool:
    """Return whether an operation asks for a tensor's shape or type, not for its values."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES


def operation_kind(node: fx.Node) -> Kind:
    """Say what a function or method does to channels."""
    name = operation_name(node)
    if node.op == "call_function" and getattr(node.target, "__module__", None) not in _LIBRARY:
        return "other"
    if _is_flatten(node, name):
        return "flatten"
    if name == "mean" and _over_image(node):
        return "mean"
    return next((kind for kind, names in _KINDS.items() if name in names), "other")


def keeps_axes(node: fx.Node) -> bool:
    """Return whether a mean leaves its axes in place, with length 1."""
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def _over_image(node: fx.Node) -> bool:
    """Return whether a mean runs over the last two of four axes."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(axes, (list, tuple)) and set(axes) in ({2, 3}, {-1, -2})


def _is_flatten(node: fx.Node, name: str) -> bool:
    """Return whether all axes behind the batch become one: flatten(1), or view(size(0), -1)."""
    if name == "flatten":
        return node.args[1:] in ((1,), (1, -1)) and not node.kwargs
    if name not in ("view", "reshape") or len(node.args) != 3 or node.args[2] != -1:
        return False
    tensor, length = node.args[0], node.args[1]
    if not isinstance(length, fx.Node):
        return False
    if length.target == "size":
        return bool(length.args == (tensor, 0))
    source = length.args[0] if length.args else None
    of_shape = isinstance(source, fx.Node) and source.target is getattr and source.args == (tensor, "shape")
    return bool(of_shape and operation_name(length) == "getitem" and length.args[1] == 0)
