"""The trainer with a network, loaders and a callback of your own: a small network on shapes that are drawn here.

    pip install .                                  # in a checkout of torchlocal
    python examples/own_objects.py                 # half a minute on one CPU core
    python examples/own_objects.py --resume        # goes on where it was stopped, bit for bit

It leaves a run folder (checkpoints, metrics.csv, result.json) and the trained network, an ordinary one.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchlocal as tl
from torchlocal.run.callbacks import RunState

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default="runs/own-objects", help="run folder (default: runs/own-objects)")
parser.add_argument("--epochs", type=int, default=5, help="passes over the training images (default: 5)")
parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
options = parser.parse_args()


class Patches(nn.Module):
    """Patches of 4x4 pixels, mixed over space and over channels, block by block."""

    def __init__(self, num_classes: int, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, 1, H, W) to (B, num_classes)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """A depthwise and a pointwise convolution with a shortcut around each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.space = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, groups=width))
        self.channels = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, width, 1), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same."""
        x = x + self.space(x)
        return x + self.channels(x)


def draw(num_images: int, seed: int) -> TensorDataset:
    """Noisy images of 16x16 with a bar: upright, level, falling or rising."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_images,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    distance = torch.stack([columns, rows, rows - columns + 8, rows + columns - 8])[labels]
    shift = torch.randint(5, 12, (num_images, 1, 1), generator=generator)
    images = (distance - shift).abs().lt(2).float() + 0.5 * torch.randn(num_images, 16, 16, generator=generator)
    return TensorDataset(images[:, None], labels)


class Print(tl.Callback):
    """Tells each checkpoint; TensorBoard and metrics.csv are written anyway."""

    def on_checkpoint(self, state: RunState, path: Path) -> None:
        """Print one line."""
        print(f"step {state.step} of {state.num_steps}: wrote {path.name}")


loaders = {
    "train": DataLoader(draw(1024, seed=1), batch_size=64, shuffle=True),
    "validation": DataLoader(draw(256, seed=2), batch_size=256),
    "test": DataLoader(draw(512, seed=3), batch_size=256),
}
config = tl.FitConfig.of(
    out=options.out, modules=3, epochs=options.epochs, optimizer="adamw", lr=0.003, precision="fp32"
)
torch.manual_seed(0)
model = Patches(num_classes=4)  # trained in place
try:
    result = tl.fit(config, model=model, data=loaders, callbacks=[Print()], resume=options.resume)
except ValueError as error:  # the folder holds a run, or a value cannot work
    parser.error(str(error))
print(f"test accuracy {result['test_accuracy']:.3f}, by depth {[round(a, 3) for a in result['depth_accuracy']]}")
torch.save(model.state_dict(), f"{options.out}/model.pt")
