"""Small models whose arithmetic is exact in float64, so that outputs can be compared to the bit."""

from __future__ import annotations

import timm
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


@torch.no_grad()
def whole_numbers(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a model with small integers; norms divide by powers of two. In eval mode and float64 nothing rounds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)

    for parameter in model.parameters():
        # Few nonzeros a filter: the values must not outgrow the 53 bits of a float64 on their way.
        share = min(0.5, 4 / max(1, parameter[0].numel()))
        parameter.copy_(draw(parameter, -3, 3) * (torch.rand(parameter.shape, generator=generator) < share))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.0
            module.running_mean.copy_(draw(module.running_mean, -2, 2))
            module.running_var.copy_(4.0 ** draw(module.running_var, 0, 1))
            if module.affine:
                module.weight.copy_(draw(module.weight, 1, 2))
    return model.double().eval()


def resnet_basic() -> nn.Module:
    return ResNet(BasicBlock, [2, 1, 1, 1], num_classes=4)


def resnet_bottleneck(groups: int = 1, width: int = 8) -> nn.Module:
    return ResNet(Bottleneck, [2, 1, 1, 1], num_classes=4, width_per_group=width, groups=groups)


class Squeeze(nn.Module):
    """Squeeze and excitation with a gate that stays a whole number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * nn.functional.relu6(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))


class Inverted(nn.Module):
    """MobileNet's block: expand, depthwise, gate, project, add."""

    def __init__(self, channels: int, expand: int) -> None:
        super().__init__()
        inner = channels * expand
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            Squeeze(inner),
            *(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(Inverted(16, 2), Inverted(16, 3), nn.Conv2d(16, 24, 1), nn.PReLU(24)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 4)),
    )


def deit() -> nn.Module:
    """timm's vision transformer without norms, whose queries are 0: four patches, so every attention weight is 1/4."""
    model = timm.create_model(
        "deit_tiny_patch16_224",
        **{"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4, "class_token": False},
        **{"global_pool": "avg", "norm_layer": nn.Identity, "act_layer": nn.ReLU},
    )
    model.fc_norm = nn.Identity()
    return model


@torch.no_grad()
def without_queries(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
            tensor[: len(tensor) // 3] = 0
    return model
