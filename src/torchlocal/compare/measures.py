"""What runs are judged by: accuracy, the loss over tokens, or where there is neither, the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["ACCURACY", "LOSS", "TOKEN_LOSS", "Further", "Judged", "Measure", "measure_of"]


class Judged(Protocol):
    """What was measured of a method: the mean of the quantity on test data, and by name what is told beside it."""

    @property
    def mean(self) -> float:
        """Over seeds."""

    @property
    def further(self) -> Mapping[str, tuple[float | None, ...]]:
        """Of every seed, by its name in result.json."""


@dataclass(frozen=True, kw_only=True)
class Further:
    """What is told beside the judged quantity, in a column of its own.

    Args:
        name: of the column in CSV.
        header: of the column in tables.
        value: takes it from what was measured of a method; None where that lacks it.
        form: how it is written, as format specification.
        note: what the report says of it, with `{number}` for that of its column.
        narrow: whether it is also shown in a terminal.
    """

    name: str
    header: str
    value: Callable[[Judged], float | None]
    form: str
    note: str = ""
    narrow: bool = True


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The quantity that runs are judged by: on validation data it chooses the epoch, on test data it is reported.

    Args:
        name: of the quantity; result.json and metrics.csv have it as `test_NAME`, `validation_NAME`, `depth_NAME`.
        lower: whether less is better.
        scale: what is written is the quantity times this.
        form: how that is written, as format specification.
        unit: what follows the number, in a sentence.
        points: what follows a difference.
        words: what is before the number, in a sentence.
        gap: what local training loses and a method wins back, in words.
        across: what curves are drawn over: "epochs", or "steps" where an epoch is no pass over the data.
        curve: name of the figure with the curves.
        by_depth: what is drawn by depth: its name, and the function of the quantity.
        further: further columns.
        of_runs: what runs.csv holds beside the quantity itself, by its names in result.json.
    """

    name: str
    lower: bool
    scale: float = 1.0
    form: str
    unit: str = ""
    points: str = ""
    words: str = ""
    gap: str
    across: str = "epochs"
    curve: str
    by_depth: tuple[str, Callable[[float], float]]
    further: tuple[Further, ...] = ()
    of_runs: tuple[str, ...] = ()

    def number(self, mean: float, std: float | None = None) -> str:
        """A mean, and its spread over seeds where there is one: "76.0 ± 1.4"."""
        spread = "" if std is None else f" ± {self.scale * std:{self.form}}"
        return f"{self.scale * mean:{self.form}}{spread}"

    def told(self, mean: float, std: float | None = None) -> str:
        """The same in a sentence."""
        return f"{self.words}{self.number(mean, std)}{self.unit}"

    def gain(self, value: float, other: float) -> float:
        """By how much a value is better than another one."""
        return other - value if self.lower else value - other

    def best(self, values: Mapping[str, float]) -> str:
        """The name of the best of several values."""
        return (min if self.lower else max)(values, key=values.__getitem__)

    def reached(self, curve: Iterable[float], goal: float) -> int | None:
        """Index of the first value of a curve that is as good as a goal; None where there is none."""
        return next((i for i, value in enumerate(curve) if self.gain(value, goal) >= 0), None)

    @property
    def header(self) -> str:
        """Of the column of the quantity."""
        return f"Test {self.name}{',' if self.unit else ''}{self.unit} (n)"

    @property
    def axis(self) -> str:
        """Name and unit, for an axis."""
        return self.name + (f" ({self.unit.strip()})" if self.unit else "")


def _mean(name: str) -> Callable[[Judged], float | None]:
    """The mean over seeds of something in result.json; None where a seed lacks it."""

    def of(result: Judged) -> float | None:
        values = result.further.get(name, (None,))
        return None if None in values else math.fsum(v for v in values if v is not None) / len(values)

    return of


def perplexity(loss: float) -> float:
    """That of a mean loss over tokens; infinite where that is too large for a number."""
    return math.exp(loss) if loss < 700 else math.inf


_ABOVE = "the loss that local training ends with above end-to-end training and the method takes off again"

ACCURACY = Measure(
    name="accuracy",
    lower=False,
    scale=100.0,
    form=".1f",
    unit=" %",
    points=" points",
    gap="the accuracy that local training loses against end-to-end training and the method wins back",
    curve="accuracy",
    by_depth=("accuracy (%)", lambda value: 100 * value),
)
LOSS = Measure(
    name="loss",
    lower=True,
    form="#.4g",
    words="loss ",
    gap=_ABOVE,
    curve="validation-loss",
    by_depth=("loss", lambda value: value),
)
TOKEN_LOSS = Measure(
    name="loss",
    lower=True,
    form=".3f",
    words="loss ",
    gap=_ABOVE,
    across="steps",
    curve="validation-loss",
    by_depth=("perplexity", perplexity),
    further=(
        Further(
            name="perplexity",
            header="Perplexity",
            value=lambda result: perplexity(result.mean),
            form=".2f",
            note="Perplexity ({number}) is the exponential of the mean test loss, which is in nats per token.",
        ),
        Further(
            name="bits_per_byte",
            header="Bits/byte",
            value=_mean("test_bits_per_byte"),
            form=".3f",
            note="Bits per byte ({number}) is the test loss in bits, over the bytes of text of a token.",
        ),
        Further(
            name="validation_loss",
            header="Validation loss",
            value=_mean("validation_loss"),
            form=".3f",
            note="Validation loss ({number}) is that of the chosen epoch, mean over seeds.",
            narrow=False,
        ),
    ),
    of_runs=("validation_perplexity", "test_perplexity", "validation_bits_per_byte", "test_bits_per_byte"),
)


def measure_of(result: Mapping[str, Any]) -> Measure:
    """What a run is judged by, from its result.json: accuracy where targets are classes, else the loss."""
    if "text" in result:
        return TOKEN_LOSS
    return LOSS if result["test_accuracy"] is None else ACCURACY
