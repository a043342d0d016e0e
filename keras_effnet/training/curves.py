"""The figures of a training: a table as CSV, and its curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.quantization.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_TRAINING, _VALIDATION, _RATE = "#0072B2", "#D55E00", "#009E73"


def write_log(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Writes the history as CSV, from its beginning.

    A training that is resumed may have lost an epoch whose row an appended file would hold twice.
    """
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in history for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with whole(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def draw_curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Draws loss, accuracy and learning rate over the epochs of all phases.

    Args:
        history: Rows of `train`, at least one.

    Returns:
        A matplotlib figure of three panels.

    Raises:
        ImportError: If matplotlib is not installed; the message says how to install it.
        ValueError: If the history is empty.
    """
    from keras_effnet.plotting import check_installed

    if not history:
        raise ValueError("A history of one or more epochs is needed. Received: none")
    check_installed()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, accuracies, rates = figure.subplots(1, 3)
    epochs = range(1, len(history) + 1)

    def draw(axes, name, label, color):
        axes.plot(epochs, [row[name] for row in history], color=color, label=label, marker=".")

    draw(losses, "loss", "training loss", _TRAINING)
    draw(losses, "val_cross_entropy", "validation cross-entropy", _VALIDATION)
    draw(accuracies, "accuracy", "training", _TRAINING)
    draw(accuracies, "val_accuracy", "validation", _VALIDATION)
    draw(rates, "learning_rate", "at the end of the epoch", _RATE)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes, title in ((losses, "Loss"), (accuracies, "Accuracy"), (rates, "Learning rate")):
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Below, where no curve can pass behind it.
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8, frameon=False
        )
    _mark_phases((losses, accuracies, rates), history)
    return figure


def _mark_phases(panels, history: Sequence[dict[str, Any]]) -> None:
    starts = [
        (index, row["phase"])
        for index, row in enumerate(history)
        if index == 0 or history[index - 1]["phase"] != row["phase"]
    ]
    if len(starts) < 2:
        return
    for axes in panels:
        for index, name in starts:
            if index:
                axes.axvline(index + 0.5, color="#888888", linewidth=1, linestyle=":")
            axes.annotate(
                name,
                (index + (0.5 if index else 1), 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize=8,
                color="#666666",
            )
