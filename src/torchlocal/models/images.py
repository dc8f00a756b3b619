"""The field's small networks for images, and any network of torchvision or timm by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchlocal.checks import whole
from torchlocal.names import DECODERS, unknown_network

__all__ = ["CifarResNet", "LocalVGG", "build_model", "mlp", "model_names"]

# Blocks per stage; the depth is 6 n + 2 (He et al. 2016, section 4.2).
_RESNETS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}

# Widths of the 3x3 convolutions; "M" is a 2x2 max pool (Nøkland & Eidnes 2019, https://arxiv.org/abs/1901.06656).
_VGGS: dict[str, list[int | str]] = {
    "vgg8b": [128, 256, "M", 256, 512, "M", 512, "M", 512, "M"],
    "vgg11b": [128, 128, 128, 256, "M", 256, 512, "M", 512, 512, "M", 512, "M"],
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ending in a ReLU.

    Where the shape changes the shortcut is a strided 1x1 convolution with BatchNorm (option B of He et al. 2016), as
    in the networks that InfoPro and its successors train locally; the other shortcuts are identities.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` to `(B, C', H', W')`."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.downsample(x))


class CifarResNet(nn.Module):
    """The residual networks for 32x32 images of He et al. 2016 (https://arxiv.org/abs/1512.03385, section 4.2).

    Args:
        num_blocks: blocks in each of the three stages of 16, 32 and 64 channels; the depth is `6 * num_blocks + 2`.
        num_classes: number of outputs.
        in_channels: channels of the images, whose size is free.
    """

    def __init__(self, num_blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, num_blocks, stride=1)
        self.layer2 = self._stage(16, 32, num_blocks, stride=2)
        self.layer3 = self._stage(32, 64, num_blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
        blocks = [BasicBlock(in_channels, channels, stride)]
        blocks += [BasicBlock(channels, channels, 1) for _ in range(1, num_blocks)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` to `(B, num_classes)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.avgpool(x)))


class LocalVGG(nn.Module):
    """VGG8b and VGG11b of Nøkland & Eidnes 2019 (https://arxiv.org/abs/1901.06656).

    3x3 convolutions with BatchNorm and ReLU, the pool that follows kept with its convolution, then one hidden layer of
    1024 units. As in the authors' code, the first convolution of images larger than 64 pixels is 7x7 with stride 2.
    A pool that would leave less than one pixel is skipped.

    Args:
        widths: output channels of the convolutions, "M" for a pool.
        num_classes: number of outputs.
        in_channels: channels of the images.
        image_size: height and width of the images.
    """

    def __init__(
        self,
        widths: list[int | str],
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
    ) -> None:
        super().__init__()
        height, width = image_size
        blocks: list[nn.Sequential] = []
        channels = in_channels
        for entry in widths:
            if isinstance(entry, int):
                if not blocks and max(height, width) > 64:
                    convolution = nn.Conv2d(channels, entry, 7, stride=2, padding=3, bias=False)
                    height, width = (height + 1) // 2, (width + 1) // 2
                else:
                    convolution = nn.Conv2d(channels, entry, 3, padding=1, bias=False)
                blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(entry), nn.ReLU(inplace=True)))
                channels = entry
            elif min(height, width) >= 2:
                blocks[-1].append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        self.features = nn.Sequential(*blocks)
        self.flatten = nn.Flatten()
        self.hidden = _dense(channels * height * width, 1024)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` to `(B, num_classes)`."""
        return self.fc(self.hidden(self.flatten(self.features(x))))


def _dense(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features), nn.ReLU(inplace=True)
    )


def mlp(num_classes: int = 10, in_channels: int = 3, image_size: tuple[int, int] = (32, 32)) -> nn.Sequential:
    """Makes a fully connected network with three hidden layers of 1024 units (as in Nøkland & Eidnes 2019).

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        image_size: height and width of the images.

    Returns:
        Flatten, three times linear + BatchNorm + ReLU, linear: `(B, C, H, W)` to `(B, num_classes)`.
    """
    sizes = [in_channels * image_size[0] * image_size[1], 1024, 1024, 1024]
    hidden = [_dense(sizes[i], sizes[i + 1]) for i in range(3)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1024, num_classes))


def _own_builders() -> dict[str, Callable[[int, int, tuple[int, int]], nn.Module]]:
    builders: dict[str, Callable[[int, int, tuple[int, int]], nn.Module]] = {}
    for name, num_blocks in _RESNETS.items():
        builders[name] = lambda classes, channels, size, n=num_blocks: CifarResNet(n, classes, channels)  # type: ignore[misc]
    for name, widths in _VGGS.items():
        builders[name] = lambda classes, channels, size, w=widths: LocalVGG(w, classes, channels, size)  # type: ignore[misc]
    builders["mlp"] = mlp
    return builders


_OWN = _own_builders()


def model_names(library: str | None = None) -> list[str]:
    """Lists names that `build_model` knows.

    Args:
        library: None for the networks of this package, "torchvision" or "timm" for that library's classifiers.

    Returns:
        Names, with the prefix of the library.

    Raises:
        ValueError: the library is unknown or not installed.
    """
    if library is None:
        return list(_OWN)
    if library == "torchvision":
        from torchvision import models

        return [f"torchvision:{name}" for name in models.list_models(module=models)]
    if library == "timm":
        return [f"timm:{name}" for name in _import_timm("timm").list_models()]
    raise ValueError(f"library={library!r} is unknown: choose 'torchvision', 'timm' or None")


def build_model(
    name: str, *, num_classes: int, in_channels: int = 3, image_size: tuple[int, int] = (32, 32)
) -> nn.Module:
    """Builds a network by name, with random weights.

    Names: `resnet20`, `resnet32`, `resnet44`, `resnet56`, `resnet110` (He et al. 2016, for CIFAR), `vgg8b`, `vgg11b`
    (Nøkland & Eidnes 2019), `mlp`, `torchvision:NAME` and `timm:NAME`.

    Args:
        name: see above.
        num_classes: number of outputs.
        in_channels: channels of the images; where torchvision offers only three, the first convolution is replaced.
        image_size: height and width of the images (or one number for both).

    Returns:
        A network that maps `(B, in_channels, *image_size)` to `(B, num_classes)`.

    Raises:
        ValueError: the name is unknown, the library is missing, or the network does not take such images.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    whole("num_classes", num_classes, 1)
    whole("in_channels", in_channels, 1)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
        raise ValueError(f"image_size={image_size!r} must be (height, width) in pixels, both at least 1")
    library, _, short = name.rpartition(":")
    if not library and name in _OWN:
        return _OWN[name](num_classes, in_channels, size)
    if name in DECODERS or library == "hf":
        raise ValueError(f"model {name!r} predicts tokens, and these are images: choose {', '.join(_OWN)}, ...")
    if library == "torchvision":
        make, description = _torchvision_builder(short, num_classes, in_channels, size), f"torchvision's {short}"
    elif library == "timm":
        make, description = _timm_builder(short, num_classes, in_channels, size), f"timm's {short}"
    else:
        elsewhere = [known for known in model_names("torchvision") if known.endswith(f":{short}")]
        raise ValueError(unknown_network(name, elsewhere or [*model_names(), *DECODERS, *model_names("torchvision")]))
    images = f"{in_channels} x {size[0]} x {size[1]} images"
    try:
        model = make()
        output = _probe(model, in_channels, size)
    except (RuntimeError, AssertionError, TypeError, IndexError, ZeroDivisionError, ValueError) as error:
        reason = _first_sentence(error)
        raise ValueError(f"model {name!r} does not take {images} ({reason}): choose another size or model") from error
    if not isinstance(output, Tensor) or tuple(output.shape) != (2, num_classes):
        found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"model {name!r} returns {found} for two images instead of one tensor of shape (2, {num_classes}): "
            f"choose a classifier, {description} is none"
        )
    return model


def _probe(model: nn.Module, in_channels: int, size: tuple[int, int]) -> Any:
    """Runs two black images through the network, without gradients, and leaves it and the random state as they were.

    In training mode, for some networks return more than their scores only then.
    """
    training = model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return model(torch.zeros(2, in_channels, *size))
    finally:
        model.train(training)
        for buffer, before in buffers:
            buffer.copy_(before)


def _torchvision_builder(
    name: str, num_classes: int, in_channels: int, size: tuple[int, int]
) -> Callable[[], nn.Module]:
    from torchvision import models

    if name not in models.list_models(module=models):
        if name in models.list_models():
            raise ValueError(
                f"model 'torchvision:{name}' is not an image classifier (it detects, segments, or works on video or on "
                f"quantised numbers): choose a classifier such as 'torchvision:resnet50'"
            )
        raise ValueError(unknown_network(f"torchvision:{name}", model_names("torchvision")))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # With auxiliary classifiers they return several tensors while training; ours are attached by decouple.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        if size[0] != size[1]:
            raise ValueError(f"model 'torchvision:{name}' takes square images only, not {size}: choose another model")
        options = {"image_size": size[0]}
    elif name.startswith("maxvit"):
        options = {"input_size": size}

    def make() -> nn.Module:
        model = models.get_model(name, weights=None, num_classes=num_classes, **options)
        if in_channels != 3:
            _replace_first_convolution(model, in_channels)
        return model

    return make


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Gives the first convolution another number of input channels, in place.

    The weights are those the library drew, repeated over the channels and rescaled so that the variance of the output
    stays as the library meant it.
    """
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    assert old.in_channels == 3 and old.groups == 1, f"{name} is not a convolution of colour images"
    weight = old.weight.detach()[:, torch.arange(in_channels) % 3] * (3 / in_channels) ** 0.5
    old.weight = nn.Parameter(weight)
    old.in_channels = in_channels


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"model {name!r} needs timm, which is not installed: pip install 'torchlocal[timm]'"
        ) from error
    return timm


def _timm_builder(name: str, num_classes: int, in_channels: int, size: tuple[int, int]) -> Callable[[], nn.Module]:
    timm = _import_timm(f"timm:{name}")
    # A tag of pretrained weights may follow a dot; anything else, a hub address above all, is not a timm name.
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(unknown_network(f"timm:{name}", timm.list_models(), wanted=name, prefix="timm:"))

    def make() -> nn.Module:
        options = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
        try:
            return timm.create_model(name, img_size=size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        return timm.create_model(name, **options)  # a network for images of any size

    return make


def _first_sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split()).rstrip(".")
