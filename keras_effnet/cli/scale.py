"""find the largest model of the family within a budget, or scale one by phi

Compound scaling multiplies depth, width and resolution by alpha^phi, beta^phi and gamma^phi. With
limits, the command prints the largest phi that keeps them, first with the paper's coefficients
(1.2, 1.1, 1.15), then with others near the same cost that use the budget best. Which of them
classifies best only training can tell. Sizes may end in k, M or G (powers of 1000).

examples:
  keras-effnet scale --max-multiply-adds 0.5G --max-bytes 6M
  keras-effnet scale --base EfficientNetV2B0 --max-parameters 4M --classes 10
  keras-effnet scale --phi -2
  keras-effnet scale --phi 3 --axis width
"""

from __future__ import annotations

import argparse
import json
import math
import re
from typing import Any

from keras_effnet.cli import common
from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table
from keras_effnet.scaling import (
    COMPOUND,
    DEPTH_ONLY,
    RESOLUTION_ONLY,
    WIDTH_ONLY,
    Budget,
    CompoundScaling,
    ScaledModel,
    largest_model,
    resolve,
    search_scaling,
)
from keras_effnet.specs import ModelSpec, get_spec

_AXES = {
    "compound": COMPOUND,
    "depth": DEPTH_ONLY,
    "width": WIDTH_ONLY,
    "resolution": RESOLUTION_ONLY,
}
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_SHOWN = 5
# At 12, depth alone makes 65,000 blocks of B0's 16; beyond, only the plan would grow.
_LARGEST_PHI = 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    limits = parser.add_argument_group("budget, one or more of")
    limits.add_argument(
        "--max-multiply-adds", metavar="N", type=_size, help="of one image, e.g. 0.5G"
    )
    limits.add_argument("--max-parameters", metavar="N", type=_size, help="e.g. 4M")
    limits.add_argument(
        "--max-bytes", metavar="N", type=_size, help="of the parameters in int8 form, e.g. 6M"
    )
    parser.add_argument(
        "--phi", metavar="X", type=float, help="scale by this phi instead of a budget"
    )
    parser.add_argument(
        "--base",
        metavar="NAME",
        default="EfficientNetB0",
        help="the variant at phi 0 (default: EfficientNetB0)",
    )
    parser.add_argument(
        "--axis",
        choices=tuple(_AXES),
        default="compound",
        help="scale one axis alone, at the same growth of the multiply-adds (default: compound)",
    )
    parser.add_argument(
        "--classes",
        metavar="N",
        type=common.positive_int,
        default=1000,
        help="outputs of the classifier, which counts in small models (default: 1000)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        ValueError: If no scaling fits the budget.
    """
    base = common.checked(get_spec, args.base)
    scaling = _AXES[args.axis]
    limits = (args.max_multiply_adds, args.max_parameters, args.max_bytes)
    if (args.phi is None) == (limits == (None, None, None)):
        raise UsageError(
            "Either a budget (--max-multiply-adds, --max-parameters, --max-bytes) or --phi is "
            "needed."
        )
    if args.phi is None:
        budget = common.checked(Budget, *limits)
        models = _within(base, budget, scaling, args.classes)
    else:
        budget = None
        models = [_at(base, scaling, args.phi, args.classes)]
    if args.json:
        print(json.dumps([_row(model, budget) for model in models], indent=2))
        return
    print(_table(models, budget))
    print(f"\nBuild the first of them:\n{_snippet(models[0], base, args.classes)}")


def _within(
    base: ModelSpec, budget: Budget, scaling: CompoundScaling, classes: int
) -> list[ScaledModel]:
    """The largest model by `scaling`, then, for compound scaling, the best of the search."""
    first = largest_model(base, budget, scaling, classes=classes)
    if scaling != COMPOUND:
        return [first]
    # Different coefficients often round to the same network.
    different: dict[tuple[int, int, int], ScaledModel] = {}
    for model in (first, *search_scaling(base, budget, classes=classes)):
        plan = model.plan
        different.setdefault((plan.multiply_adds, plan.parameters, len(plan.blocks)), model)
    return list(different.values())[:_SHOWN]


def _at(base: ModelSpec, scaling: CompoundScaling, phi: float, classes: int) -> ScaledModel:
    if not abs(phi) <= _LARGEST_PHI:
        raise UsageError(
            f"--phi must be between {-_LARGEST_PHI} and {_LARGEST_PHI}. Received: {phi:g}"
        )
    spec = scaling.scale(base, phi)
    return ScaledModel(spec, resolve(spec, classes=classes), scaling, phi)


def _row(model: ScaledModel, budget: Budget | None) -> dict[str, Any]:
    return {
        "name": model.spec.name,
        "phi": model.phi,
        "alpha": round(model.scaling.alpha, 4),
        "beta": round(model.scaling.beta, 4),
        "gamma": round(model.scaling.gamma, 4),
        "depth": round(model.spec.depth, 4),
        "width": round(model.spec.width, 4),
        "resolution": model.spec.resolution,
        "blocks": len(model.plan.blocks),
        "parameters": model.plan.parameters,
        "multiply_adds": model.plan.multiply_adds,
        "int8_bytes": model.plan.int8_bytes,
        "share_of_budget": None if budget is None else budget.usage(model.plan),
    }


def _table(models: list[ScaledModel], budget: Budget | None) -> str:
    cells = [
        (
            "alpha, beta, gamma",
            "phi",
            "depth",
            "width",
            "input",
            "blocks",
            "parameters",
            "multiply-adds",
            "int8 bytes",
            *([] if budget is None else ["share of budget"]),
        )
    ]
    for row in (_row(model, budget) for model in models):
        shares = (row["share_of_budget"] or {}).values()
        cells.append(
            (
                f"{row['alpha']:g}, {row['beta']:g}, {row['gamma']:g}",
                f"{row['phi']:g}",
                f"{row['depth']:.3g}",
                f"{row['width']:.3g}",
                str(row["resolution"]),
                str(row["blocks"]),
                f"{row['parameters']:,}",
                f"{row['multiply_adds'] / 1e9:.3g} G",
                f"{row['int8_bytes']:,}",
                *([] if budget is None else [" / ".join(f"{share:.0%}" for share in shares)]),
            )
        )
    return text_table(cells)


def _snippet(model: ScaledModel, base: ModelSpec, classes: int) -> str:
    coefficients = ", ".join(
        repr(value) for value in (model.scaling.alpha, model.scaling.beta, model.scaling.gamma)
    )
    return (
        "  from keras_effnet import SPECS, CompoundScaling, create_model\n"
        f'  spec = CompoundScaling({coefficients}).scale(SPECS["{base.constructor}"], '
        f"{model.phi:g})\n"
        f"  model = create_model(spec, weights=None, classes={classes})"
    )


def _size(text: str) -> float:
    """argparse type: a positive number with an optional k, M or G (and B, for bytes)."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmg]?)b?", text.strip().lower())
    try:
        value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f"a positive number such as 500k, 6M or 0.5G is needed, not {text!r}"
        )
    return value
