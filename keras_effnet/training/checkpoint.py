"""Checkpoints: everything that a training needs to go on as if it had never stopped.

One file holds the variables of model and optimizer, the seeds of dropout among them, and the
position. What else is random is a function of the position.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_effnet.quantization.files import read_state, write_state


@dataclasses.dataclass
class Position:
    """Where a training stands.

    Attributes:
        phase: Index of the phase.
        epoch: Epochs of this phase that are finished.
        step: Steps of the epoch after them that are finished.
        sums: Sums over those steps of what is averaged over an epoch, by name.
        history: One row for each finished epoch of all phases.
        unreadable: Image files that could not be read, and why.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)


def is_finite(model: keras.Model) -> bool:
    """Whether all variables of a model and its optimizer are finite."""
    arrays = (keras.ops.convert_to_numpy(variable) for variable in _variables(model))
    return all(np.all(np.isfinite(array)) for array in arrays if array.dtype.kind == "f")


def save_checkpoint(path: Path, model: keras.Model, position: Position, write: bool = True) -> None:
    """Writes a checkpoint.

    Args:
        path: The file to write or replace.
        model: A compiled model whose optimizer is built.
        position: Where it stands.
        write: Whether this process writes. Of several that train together one does, but all must
            call this: reading variables may need all of them.

    Raises:
        OSError: If it cannot be written; an earlier checkpoint is left as it was.
    """
    arrays = [keras.ops.convert_to_numpy(variable) for variable in _variables(model)]
    if write:
        write_state(path, arrays, dataclasses.asdict(position))


def read_position(path: Path) -> Position:
    """Reads where the training of a checkpoint stands.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the file is none.
    """
    _, position = read_state(path)
    return Position(**position)


def restore_checkpoint(path: Path, model: keras.Model) -> None:
    """Puts the variables of a checkpoint into a model of the same kind and phase.

    Args:
        path: The checkpoint.
        model: A compiled model whose optimizer is built.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the file is none, or belongs to another model.
    """
    (arrays, _), variables = read_state(path), _variables(model)
    saved = [array.shape for array in arrays]
    expected = [tuple(variable.shape) for variable in variables]
    if saved != expected:
        raise ValueError(
            f"The checkpoint {str(path)!r} belongs to another model or optimizer: it holds "
            f"{len(saved)} variables, this training has {len(expected)}"
            + ("." if len(saved) != len(expected) else ", of other shapes.")
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def _variables(model: keras.Model) -> list[Any]:
    """Variables of a model, its dropout's seeds included, and of its optimizer; each once.

    Those of metrics are left out: they are reset in every step.
    """
    of_metrics = {id(variable) for variable in model.metrics_variables}
    found = {id(variable): variable for variable in (*model.variables, *model.optimizer.variables)}
    return [variable for key, variable in found.items() if key not in of_metrics]
