"""A LightningModule on top of the core: Lightning runs the loop and the checkpoints, torchlocal the steps.

    pip install '.[lightning]'
    python examples/lightning_module.py                                 # 5 epochs of Fashion-MNIST at 14×14 (shipped)
    python examples/lightning_module.py --max-steps 10 --out runs/trial
    python examples/lightning_module.py --resume runs/lightning/...ckpt

Three things differ from an ordinary LightningModule:

- Optimisation is manual, as a local step runs K backward passes; so Lightning takes no clipping or accumulation flags.
- The Trainer's precision stays as it is; autocast goes to the steps, which enter it anew for every local module.
- One device: a DistributedDataParallel around the whole network does not go with K backward passes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

import torchlocal as tl
from torchlocal.data import Split, load_data
from torchlocal.guidance import Guidance
from torchlocal.models import build_model

try:
    import lightning
    from lightning.pytorch.loggers import CSVLogger
except ModuleNotFoundError as error:
    raise SystemExit(
        "this example needs Lightning, which is not installed: pip install 'torchlocal[lightning]'"
    ) from error


class LocalLearner(lightning.LightningModule):
    """Trains a network as local modules with guidance.

    Args:
        net: the decoupled network.
        guidance: says which steps are guided.
        num_steps: length of training; the learning rate follows a cosine down to 0.
        lr: learning rate at the start.
        autocast: run forward passes in this dtype, for example ``torch.bfloat16``.
    """

    def __init__(
        self,
        net: tl.DecoupledNetwork,
        guidance: Guidance,
        *,
        num_steps: int,
        lr: float = 0.1,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.guidance = net, guidance
        self.num_steps, self.lr, self.autocast = num_steps, lr, autocast

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        # With one optimizer, Lightning's global step counts batches; it is in the checkpoint, so guidance goes on too.
        step = self.net.guided_step if self.guidance(self.global_step) else self.net.local_step
        losses = step(*batch, backward=self.manual_backward, autocast=self.autocast)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        self.log("train_loss", losses[-1], prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        output = self(x)
        self.log("val_loss", F.cross_entropy(output, y), prog_bar=True)
        self.log("val_accuracy", (output.argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=self.num_steps)]


def make_loader(split: Split, *, train: bool, batch_size: int = 128) -> DataLoader[tuple[Tensor, ...]]:
    """A split as an ordinary DataLoader; the images fit into memory and are not augmented."""
    x, y = next(split.batches(len(split), train=False))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=train, drop_last=train)


def main() -> None:
    """Train, then save the plain network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="epochs (default: 5)")
    parser.add_argument("--max-steps", type=int, default=None, help="stop after this many steps")
    parser.add_argument("--modules", type=int, default=10, help="local modules K, 1 to 10 (default: 10)")
    parser.add_argument("--period", type=int, default=5, help="one step of so many is guided (default: 5)")
    parser.add_argument("--resume", type=Path, default=None, help="go on from this checkpoint of Lightning's")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), help="folder (default: runs/lightning)")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"--epochs: must be at least 1, not {options.epochs}")
    if options.max_steps is not None and options.max_steps < 1:
        parser.error(f"--max-steps: must be at least 1, not {options.max_steps}")
    if options.resume is not None and not options.resume.is_file():
        parser.error(f"--resume: there is no file {options.resume}")

    lightning.seed_everything(0, verbose=False)
    data = load_data("fashion-mnist-small")
    model = build_model("resnet20", num_classes=10, in_channels=1, image_size=data.shape[1:])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        net = tl.decouple(model, options.modules, sample=(128, *data.shape))
        guidance = tl.PeriodicGuidance(period=options.period)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        devices=1,
        default_root_dir=options.out,
        logger=CSVLogger(options.out, name=None),
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    loader = make_loader(data.train, train=True)
    trainer.fit(
        LocalLearner(net, guidance, num_steps=options.epochs * len(loader)),
        loader,
        make_loader(data.validation, train=False),
        ckpt_path=options.resume,
        weights_only=True,
    )
    torch.save(model.state_dict(), options.out / "resnet20.pt")
    print(f"the plain network is in {options.out / 'resnet20.pt'}")


if __name__ == "__main__":
    main()
