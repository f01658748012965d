"""A ResNet small enough that 2 bits hurt: five 3x3 convolutions under a pattern, two 1x1, 12 to 48 channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 12


class Block(nn.Module):
    """The basic block of He et al. 2015."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        shape_changes = stride != 1 or channels != filters
        projection = [nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)]
        self.downsample = nn.Sequential(*projection) if shape_changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, filters, h / stride, w / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


def network(classes: int) -> nn.Module:
    """Return the untrained network: [n, 1, SIDE, SIDE] -> [n, classes]."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        Block(WIDTH, WIDTH, 1),
        Block(WIDTH, 2 * WIDTH, 2),
        Block(2 * WIDTH, 4 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, classes),
    )
