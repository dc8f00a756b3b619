"""What the user hands in in place of names: a network, data, a criterion."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from torchlocal.cut.batches import as_prediction
from torchlocal.data import DataBundle, LoaderBundle, TextBundle, bundle, load_data
from torchlocal.models import build_language_model, build_model
from torchlocal.run.config import DataConfig, FitConfig, declared
from torchlocal.tokens import TokenCrossEntropy

__all__ = ["OWN", "Own"]

OWN = "own:"  # begins the name, in a configuration, of what is no name


@dataclass(frozen=True, kw_only=True)
class Own:
    """A network, data and a criterion of the user's own; what is None is made from the configuration.

    Args:
        model: a network, trained in place, or a function that makes one: after the seed is set, so that the run's seed
            decides its weights.
        data: loaders by part (:func:`torchlocal.data.bundle`), or what :func:`torchlocal.data.load_data` returns.
        criterion: called with the prediction and the target; cross-entropy by default.
        prediction: takes the prediction from what the network returns; by default the tensor itself, or its `.logits`.
        name: of the model, where that is a copy of another.
    """

    model: nn.Module | Callable[[], nn.Module] | None = None
    data: Any = None
    criterion: Callable[[Tensor, Any], Tensor] | None = None
    prediction: Callable[[Any], Tensor] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "criterion", "prediction"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                wanted = "an nn.Module, or a function that makes one" if name == "model" else "a function"
                raise ValueError(f"{name}={value!r} must be {wanted}; leave it out for what the configuration says")

    @cached_property
    def bundle(self) -> DataBundle | None:
        """The data that were handed in."""
        return None if self.data is None else bundle(self.data)

    def copied(self) -> Own:
        """The same for several runs: each trains a copy of the network."""
        if not isinstance(self.model, nn.Module):
            return self
        return dataclasses.replace(self, model=partial(copy.deepcopy, self.model), name=_name(self.model))

    def named(self, config: FitConfig) -> FitConfig:
        """The configuration with the names of these objects, which a checkpoint and its resumption have to agree on.

        Raises:
            ValueError: the configuration names something else, or an option means nothing to what was handed in.
        """
        plain, changes = FitConfig(), dict[str, Any]()
        if self.model is not None:
            changes["model"] = OWN + (self.name or _name(self.model))
        if self.bundle is not None:
            changes["data"] = OWN + self.bundle.name.removeprefix(OWN)
            if isinstance(self.bundle, LoaderBundle):
                changes["batch_size"] = self.bundle.train.batch_size
        for name, value in changes.items():
            given = config.value(name)
            if name != "batch_size" and given not in (value, plain.value(name)):
                raise ValueError(f"{name}={given!r} names another than the one that was handed in: leave it out")
        for one in declared(DataConfig) if self.bundle is not None else ():
            if one.name != "data" and config.value(one.name) != one.default:
                raise ValueError(
                    f"{one.name}={config.value(one.name)!r} means nothing to data of your own: leave it out"
                )
        if self.model is not None and config.model.options:
            raise ValueError(
                f"model_options={config.model.options!r} means nothing to a network of your own: leave it out"
            )
        if self.criterion is not None and config.optimisation.label_smoothing:
            raise ValueError(
                f"label_smoothing={config.optimisation.label_smoothing} means nothing to a criterion of your own: "
                "leave it out"
            )
        return config.changed(**changes)

    def load(self, config: FitConfig) -> DataBundle:
        """The data of a run. Their validation split does not depend on the run's seed.

        Raises:
            ValueError: they cannot be loaded, or have a single class: any network would be right on all images.
        """
        if self.bundle is not None:
            return self.bundle
        _refuse_lost(config, "data")
        data = load_data(
            config.data.name,
            root=config.data.root,
            num_train=config.data.num_train,
            num_validation=config.data.num_validation,
            augment=config.data.augment,
            image_size=config.data.image_size,
            num_workers=config.data.num_workers,
            context=config.data.context,
            tokenizer=config.data.tokenizer,
            epoch_rows=config.data.epoch_rows,
        )
        if data.num_classes < 2 and not isinstance(data, TextBundle):
            raise ValueError(
                f"data={config.data.name!r} has a single class ({', '.join(data.classes)}), of which nothing can be "
                "learned: give every class a folder of its own in train"
            )
        return data

    def make_model(self, config: FitConfig, data: DataBundle) -> nn.Module:
        """The backbone; torch's global generator decides the weights of one that is made.

        Raises:
            ValueError: it cannot be made.
        """
        if isinstance(self.model, nn.Module):
            return self.model
        if self.model is not None:
            model = self.model()
            if not isinstance(model, nn.Module):
                raise ValueError(f"model() returned {type(model).__name__}: let it return an nn.Module")
            return model
        _refuse_lost(config, "model")
        if isinstance(data, LoaderBundle):
            raise ValueError(
                f"model={config.model.name!r} is made for a number of classes, which loaders do not tell: give model= "
                "an nn.Module as well"
            )
        if isinstance(data, TextBundle):
            return build_language_model(
                config.model.name, vocabulary=data.vocabulary, context=data.context, options=config.model.options
            )
        if config.model.options:
            raise ValueError(
                f"model_options={config.model.options!r} means nothing to model={config.model.name!r}: leave it out"
            )
        channels, height, width = data.shape
        return build_model(
            config.model.name, num_classes=data.num_classes, in_channels=channels, image_size=(height, width)
        )

    def make_criterion(self, config: FitConfig, data: DataBundle) -> Callable[[Tensor, Any], Tensor]:
        """The loss that is trained on."""
        smoothing, scores = config.optimisation.label_smoothing, config.memory.scores
        if scores != "whole" and (self.criterion is not None or not isinstance(data, TextBundle)):
            raise ValueError(
                f"scores={scores!r} is for the loss of text that comes with the data: leave it out, or give a "
                "torchlocal.tokens.TokenCrossEntropy as criterion that says so itself"
            )
        if isinstance(data, TextBundle):
            return self.criterion or TokenCrossEntropy(label_smoothing=smoothing, scores=scores)
        return self.criterion or partial(F.cross_entropy, label_smoothing=smoothing)

    @property
    def criterion_name(self) -> str:
        """The criterion's name, which a checkpoint and its resumption have to agree on."""
        return "cross-entropy" if self.criterion is None else _name(self.criterion)

    def make_prediction(self) -> Callable[[Any], Tensor]:
        """What takes the prediction from what the network returns."""
        return self.prediction or as_prediction


def _refuse_lost(config: FitConfig, name: str) -> None:
    value = config.value(name)
    if value.startswith(OWN):
        raise ValueError(
            f"{name}={value!r} is an object of the program that began this run: call torchlocal.fit or "
            f"torchlocal.evaluate there, with {name}="
        )


def _name(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)
