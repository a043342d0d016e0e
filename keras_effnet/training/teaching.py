"""A teacher beside the labels: the targets, the loss and the metrics of both.

Source: Hinton et al., 2015, section 2 (https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_effnet.quantization.distillation import divergence
from keras_effnet.training.batches import Batch, EvaluationBatches
from keras_effnet.training.config import TrainingConfig

# Smaller probabilities count as so much; as in Keras' cross-entropies.
_LEAST = 1e-7


def taught(teacher: keras.Model, batch: Batch) -> Batch:
    """Puts the teacher's predictions behind the labels: targets of shape `(n, 2 * classes)`."""
    predicted = ops.convert_to_numpy(teacher.predict_on_batch(batch.images))
    targets = np.concatenate([batch.targets, predicted], axis=1, dtype=np.float32)
    return batch._replace(targets=targets)


def losses_of(
    model: keras.Model,
    teacher: keras.Model | None,
    batches: EvaluationBatches,
    config: TrainingConfig,
) -> np.ndarray:
    """Returns the loss of each image without label smoothing, float32 of shape `(images,)`.

    Args:
        model: Outputs probabilities, `(n, classes)`.
        teacher: As of the training; None where it had none.
        batches: The images.
        config: Of the training.
    """
    loss = keras.losses.categorical_crossentropy
    if teacher is not None:
        loss = loss_of(config.teacher_weight, config.teacher_temperature, 0.0)
    found = []
    for batch in batches.batches():
        targets = batch.targets if teacher is None else taught(teacher, batch).targets
        losses = ops.convert_to_numpy(loss(targets, model.predict_on_batch(batch.images)))
        found.append(losses[batch.weights > 0])
    return np.concatenate(found)


def _parts(targets: Any) -> tuple[Any, Any]:
    classes = targets.shape[-1] // 2
    return targets[:, :classes], targets[:, classes:]


def loss_of(share: float, temperature: float, label_smoothing: float) -> Callable[[Any, Any], Any]:
    """Returns the loss: the cross-entropy with the labels and the divergence from the teacher.

    Targets are those of `taught`; predictions are probabilities, `(n, classes)`.

    Args:
        share: Weight of the teacher, in [0, 1]; the labels have the rest.
        temperature: Divides the logits of teacher and student, positive.
        label_smoothing: Of the labels, in [0, 1).
    """

    def loss(y_true: Any, y_pred: Any) -> Any:
        labels, wanted = _parts(ops.cast(y_true, "float32"))
        y_pred = ops.cast(y_pred, "float32")
        plain = keras.losses.categorical_crossentropy(
            labels, y_pred, label_smoothing=label_smoothing
        )
        # Logits are logarithms of probabilities, but for a constant.
        logits = (ops.log(ops.maximum(part, _LEAST)) for part in (wanted, y_pred))
        return (1 - share) * plain + share * divergence(*logits, temperature)

    return loss


def metrics_of(share: float, temperature: float) -> list[keras.metrics.Metric]:
    """Returns the accuracy by the labels, and the loss without label smoothing."""

    def accuracy(y_true: Any, y_pred: Any) -> Any:
        return keras.metrics.categorical_accuracy(_parts(y_true)[0], y_pred)

    functions = {"accuracy": accuracy, "cross_entropy": loss_of(share, temperature, 0.0)}
    return [
        keras.metrics.MeanMetricWrapper(function, name=name) for name, function in functions.items()
    ]
