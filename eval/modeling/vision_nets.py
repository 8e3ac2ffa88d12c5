"""Small image networks, and a wrapper that gives networks of other libraries the Trainer's interface."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention as ImageOutput


def image_output(logits: Tensor, labels: Tensor | None) -> ImageOutput:
    """Return logits (B, classes) and, with labels (B,), the mean cross-entropy."""
    return ImageOutput(loss=None if labels is None else functional.cross_entropy(logits, labels), logits=logits)


class ImageClassifier(nn.Module):
    """Gives a network of timm or torchvision the Trainer's interface."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageOutput:
        """Classify pixel_values (B, C, size, size); with labels (B,), also compute the loss."""
        return image_output(self.net(pixel_values), labels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: option A of He et al. 2015, section 4.2."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, channels_in, H, W) -> (B, channels, H / stride, W / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        before = self.new_channels // 2
        padding = (0, 0, 0, 0, before, self.new_channels - before)
        return functional.relu(y + functional.pad(x[..., :: self.stride, :: self.stride], padding))


class CifarResNet(nn.Module):
    """ResNet with 6n+2 layers of He et al. 2015, section 4.2: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int, num_labels: int, in_channels: int = 3):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.stage(blocks, 16, 16, 1)
        self.layer2 = self.stage(blocks, 16, 32, 2)
        self.layer3 = self.stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
        """Build a stage.

        Args:
            blocks: number of blocks.
            channels_in: channels of the stage's input.
            channels: channels of its blocks.
            stride: stride of its first block; the others have stride 1.
        """
        first = BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageOutput:
        """Classify pixel_values (B, C, 32, 32); with labels (B,), also compute the loss."""
        x = functional.relu(self.bn1(self.conv1(pixel_values)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return image_output(self.linear(x.mean((2, 3))), labels)


class ConvNet(nn.Module):
    """Four 3x3 convolutions with batch norm, and a linear layer, for images of at least 8x8 pixels."""

    def __init__(self, num_labels: int, in_channels: int = 1):
        super().__init__()
        widths, strides = (in_channels, 16, 32, 32, 64), (1, 2, 1, 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            for before, after, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.linear = nn.Linear(widths[-1], num_labels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageOutput:
        """Classify pixel_values (B, C, size, size); with labels (B,), also compute the loss."""
        x = pixel_values
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.relu(norm(conv(x)))
        return image_output(self.linear(torch.flatten(x.mean((2, 3)), 1)), labels)
