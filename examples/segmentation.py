"""Dense prediction: segment generated shapes, end-to-end, locally and with periodic guidance.

    python examples/segmentation.py                 # about a minute on two CPU cores
    python examples/segmentation.py --steps 20

Every image holds a square, a disc and a cross of random place, size and colour on a noisy ground; the target is the
class of every pixel. The auxiliary networks predict maps of scores at the resolution of their features and interpolate
them.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl

NUM_CLASSES = 4  # ground, square, disc, cross


def draw(num_images: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) and the class of every pixel (N, size, size)."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = 0.4 * torch.rand(num_images, 3, size, size, generator=generator)
    classes = torch.zeros(num_images, size, size, dtype=torch.long)
    for kind in range(1, NUM_CLASSES):
        row, column = torch.randint(size // 8, size - size // 8, (2, num_images, 1, 1), generator=generator)
        radius = torch.randint(size // 8, size // 4, (num_images, 1, 1), generator=generator)
        down, right = (rows - row).abs(), (columns - column).abs()
        inside = {
            1: torch.maximum(down, right) <= radius,
            2: down**2 + right**2 <= radius**2,
            3: (torch.minimum(down, right) <= radius // 3) & (torch.maximum(down, right) <= radius),
        }[kind]
        classes = torch.where(inside, kind, classes)
        colour = torch.rand(num_images, 3, 1, 1, generator=generator)
        images = torch.where(inside.unsqueeze(1), 0.3 + 0.7 * colour, images)
    return images + 0.1 * torch.randn(images.shape, generator=generator), classes


def block(channels: int, width: int, stride: int) -> nn.Sequential:
    """Two 3×3 convolutions with norms and ReLUs."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    )  # fmt: skip


def make_network() -> list[nn.Module]:
    """A small encoder, a quarter of the resolution at its end, and a head that makes the map of scores."""
    head = nn.Sequential(
        block(64, 64, 1), nn.Conv2d(64, NUM_CLASSES, 1), nn.Upsample(scale_factor=4, mode="bilinear")
    )  # fmt: skip
    return [block(3, 16, 1), block(16, 32, 2), block(32, 64, 2), head]


def train(guidance: tl.guidance.Guidance, *, steps: int, batch_size: int, size: int) -> float:
    """Train with a guidance and return the mean intersection over union of the classes on new images."""
    torch.manual_seed(0)
    net = tl.decouple(make_network(), sample=(batch_size, 3, size, size), rule=tl.GreedyRule(tl.rules.dense()))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        images, classes = draw(batch_size, size, generator)
        if guidance(step):
            net.guided_step(images, classes)
        else:
            net.local_step(images, classes)
        optimizer.step()
        optimizer.zero_grad()
    images, classes = draw(64, size, torch.Generator().manual_seed(2))
    net.eval()
    with torch.no_grad():
        found, wanted = (F.one_hot(c, NUM_CLASSES).bool() for c in (net(images).argmax(1), classes))
    overlap = (found & wanted).sum((0, 1, 2)) / (found | wanted).sum((0, 1, 2))
    return overlap.mean().item()


def main() -> None:
    """Train three ways and print what each reaches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--size", type=int, default=32, help="image side in pixels, a multiple of 4 (default: 32)")
    options = parser.parse_args()
    ways = {
        "end-to-end": tl.AlwaysGuidance(),
        "local": tl.NeverGuidance(),
        "PGL, every 5th step": tl.PeriodicGuidance(period=5),
    }
    for name, guidance in ways.items():
        reached = train(guidance, steps=options.steps, batch_size=options.batch_size, size=options.size)
        print(f"{name}: mean intersection over union {reached:.3f}")


if __name__ == "__main__":
    main()
