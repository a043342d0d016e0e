"""Figures: the family over phi, and predictions on images.

Functions return matplotlib figures, which notebooks show and `png` encodes; nothing is written
and matplotlib's global state (backend, pyplot) is not touched. matplotlib is imported when a
figure is drawn: `pip install "keras-effnet[plot]"`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .scaling import COMPOUND, DEPTH_ONLY, RESOLUTION_ONLY, WIDTH_ONLY, resolve
from .specs import SPECS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The phi under which the official models are commonly quoted. Their coefficients were rounded by
# hand and run ahead of it from B4 on: B7 has the depth of phi 6.2, the width of 7.3 and the
# resolution of 7.1 (see `CompoundScaling.phi_of`).
NOMINAL_PHI = {
    "EfficientNetB0": 0.0,
    "EfficientNetB1": 0.5,
    "EfficientNetB2": 1.0,
    "EfficientNetB3": 2.0,
    "EfficientNetB4": 3.0,
    "EfficientNetB5": 4.0,
    "EfficientNetB6": 5.0,
    "EfficientNetB7": 6.0,
}

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_CURVES = (
    ("compound (1.2, 1.1, 1.15)", COMPOUND, "#0072B2", 2.6),
    ("depth only", DEPTH_ONLY, "#D55E00", 1.4),
    ("width only", WIDTH_ONLY, "#009E73", 1.4),
    ("resolution only", RESOLUTION_ONLY, "#CC79A7", 1.4),
)
_RIGHT, _WRONG = "#009E73", "#D55E00"
_PHI_STEP = 0.05
_DPI = 150


def draw_family() -> Figure:
    """Draws how a network grows with phi: multiply-adds and parameters.

    Compound scaling of B0 against scaling one axis alone at the same nominal cost, 2^phi
    (arXiv:1905.11946, section 3.3), with the official B0 to B7 at their nominal phi. The curves
    have small steps: channels, repeats and resolutions are whole numbers.

    Returns:
        A figure of two panels with logarithmic vertical axes.

    Raises:
        ImportError: If matplotlib is not installed; the message says how to install it.
    """
    figure = _new_figure(width=11, height=5.2)
    left, right = figure.subplots(1, 2)
    base = SPECS["EfficientNetB0"]
    phis = np.arange(0, max(NOMINAL_PHI.values()) + _PHI_STEP / 2, _PHI_STEP)
    for label, scaling, color, width in _CURVES:
        plans = [resolve(scaling.scale(base, float(phi))) for phi in phis]
        order = 3 if scaling is COMPOUND else 2
        style = {"color": color, "linewidth": width, "label": label, "zorder": order}
        left.plot(phis, [plan.multiply_adds / 1e9 for plan in plans], **style)
        right.plot(phis, [plan.parameters / 1e6 for plan in plans], **style)
    official = {name: resolve(name) for name in NOMINAL_PHI}
    _mark(left, {name: plan.multiply_adds / 1e9 for name, plan in official.items()})
    _mark(right, {name: plan.parameters / 1e6 for name, plan in official.items()})
    _finish_axes(left, "Multiply-adds of one image", "G", base_ticks=0.25)
    _finish_axes(right, "Parameters", "M", base_ticks=4)
    figure.suptitle("Compound scaling of EfficientNet-B0 against one axis alone", weight="bold")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_predictions(
    images: np.ndarray, titles: Sequence[str], right: Sequence[bool], *, columns: int = 10
) -> Figure:
    """Draws images with what a model says of them.

    Args:
        images: Pixels in 0..255, shape `(n, height, width, 3)`, at least one.
        titles: Text above each image.
        right: Whether the model is right about each; colours the text and the frame.
        columns: Images in a row.

    Returns:
        A figure.

    Raises:
        ImportError: If matplotlib is not installed; the message says how to install it.
        ValueError: If there is no image, or not one title and one verdict for each.
    """
    if not len(images) or not len(images) == len(titles) == len(right):
        raise ValueError(
            "One title and one verdict are needed for each of one or more images. "
            f"Received: {len(images)} images, {len(titles)} titles, {len(right)} verdicts"
        )
    rows = -(-len(images) // columns)
    figure = _new_figure(width=1.0 * columns, height=1.25 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes:
        panel.set_axis_off()
    for panel, image, title, correct in zip(axes, images, titles, right, strict=False):
        color = _RIGHT if correct else _WRONG
        panel.set_axis_on()
        panel.set(xticks=(), yticks=())
        panel.imshow(np.clip(image, 0, 255).astype(np.uint8))
        panel.set_title(title, fontsize=9, color=color, weight="normal" if correct else "bold")
        for spine in panel.spines.values():
            spine.set(color=color, linewidth=1 if correct else 3)
    return figure


def png(figure: Figure) -> bytes:
    """Encodes a figure as PNG, without the date, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def check_installed() -> None:
    """Raises ImportError, with a hint, unless matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`matplotlib` is needed to draw ({error}). "
            'Install it with: pip install "keras-effnet[plot]"'
        ) from error


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, outside pyplot."""
    check_installed()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _mark(axes: Axes, values: dict[str, float]) -> None:
    """Marks the official models at their nominal phi."""
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=3, foreground="white")  # Curves pass behind the names.
    phis = [NOMINAL_PHI[name] for name in values]
    axes.plot(
        phis,
        list(values.values()),
        linestyle="none",
        marker="o",
        markersize=7,
        markerfacecolor="white",
        markeredgecolor="#222222",
        markeredgewidth=1.4,
        label="official B0 to B7",
        zorder=4,
    )
    for phi, (name, value) in zip(phis, values.items(), strict=True):
        axes.annotate(
            name.removeprefix("EfficientNet"),
            (phi, value),
            xytext=(-7, 6),
            textcoords="offset points",
            ha="right",
            path_effects=[halo],
            fontsize=9,
            weight="bold",
            zorder=5,
        )


def _finish_axes(axes: Axes, title: str, unit: str, base_ticks: float) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("φ (of the official models: nominal)")
    axes.set_yscale("log", base=2)
    axes.set_xlim(-0.45, max(NOMINAL_PHI.values()) + 0.2)
    low, high = axes.get_ylim()
    ticks = [base_ticks * 2**i for i in range(20) if low <= base_ticks * 2**i <= high]
    axes.set_yticks(ticks, [f"{tick:g} {unit}" for tick in ticks])
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
