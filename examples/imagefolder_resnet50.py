"""torchvision's ResNet-50 on a folder of images, as K local modules with every 5th step guided.

    pip install .
    python examples/imagefolder_resnet50.py FOLDER
    python examples/imagefolder_resnet50.py FOLDER --modules 8 --batch-size 128 --epochs 90 --bf16 --recompute

FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg (or test/, or both), as ImageNet does. Trains on a CUDA device if
there is one. `torchlocal plan` tells beforehand which K and batch size fit into the memory of a device.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet50

import torchlocal as tl
from torchlocal.data import Split, load_data


@torch.no_grad()
def measure_accuracy(model: nn.Module, split: Split, batch_size: int, device: str, bf16: bool) -> float:
    """Share of the images of a split that the network classifies correctly."""
    model.eval()
    correct = 0
    for x, y in split.batches(batch_size, train=False):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            correct += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    model.train()
    return correct / len(split)


def train(options: argparse.Namespace) -> None:
    """Train, tell the accuracy after every epoch, save the plain network.

    Raises:
        ValueError: an option does not fit the images or the network, or an image cannot be read.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if options.bf16 else torch.contiguous_format
    autocast = torch.bfloat16 if options.bf16 else None
    data = load_data("folder", root=options.folder, image_size=options.image_size)
    num_steps = data.train.num_batches(options.batch_size, train=True)
    print(f"{len(data.train)} training images, {data.num_classes} classes, {num_steps} steps an epoch, on {device}")

    model = resnet50(num_classes=data.num_classes).to(device)
    model = model.to(memory_format=layout)
    net = tl.decouple(model, options.modules, sample=(options.batch_size, *data.shape))
    guidance = tl.PeriodicGuidance(period=options.period)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1 * options.batch_size / 256, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs * num_steps)
    recompute = "modules" if options.recompute else None

    step = 0
    for epoch in range(options.epochs):
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for x, y in data.train.batches(options.batch_size, epoch=epoch, train=True):
            x, y = x.to(device, memory_format=layout), y.to(device)
            if guidance(step):
                losses = net.guided_step(x, y, autocast=autocast, recompute=recompute)
            else:
                losses = net.local_step(x, y, autocast=autocast)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            total += losses[-1]  # not read before the end of the epoch: that would wait for the device
            step += 1
        loss, seconds = total.item() / num_steps, time.perf_counter() - start
        accuracy = measure_accuracy(model, data.validation, options.batch_size, device, options.bf16)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, validation accuracy {accuracy:.3f}, {seconds:.0f} s")
    accuracy = measure_accuracy(model, data.test, options.batch_size, device, options.bf16)
    torch.save(model.state_dict(), options.out)
    print(f"test accuracy {accuracy:.3f}; the plain ResNet-50 is in {options.out}")


def main() -> None:
    """Read the options, and answer those that cannot work with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with train/ and val/ or test/, each of class folders")
    parser.add_argument("--image-size", type=int, default=224, help="side of the images in pixels (default: 224)")
    parser.add_argument("--modules", type=int, default=4, help="number K of local modules (default: 4)")
    parser.add_argument("--period", type=int, default=5, help="one step of so many is guided (default: 5)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs (default: 30)")
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16, images channels last")
    parser.add_argument("--recompute", action="store_true", help="guided steps keep the activations of one module only")
    parser.add_argument("--out", type=Path, default=Path("resnet50.pt"), help="the network (default: resnet50.pt)")
    options = parser.parse_args()
    for name, least in {"image_size": 32, "batch_size": 2, "epochs": 1}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: must be at least {least}, not {getattr(options, name)}")
    if options.out.is_dir() or not options.out.parent.is_dir():
        parser.error(f"--out: {options.out} cannot be written; give a file in a folder that exists")
    try:
        train(options)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
