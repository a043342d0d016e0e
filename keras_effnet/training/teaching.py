"""A teacher beside the labels: the targets, the loss and the metrics of both.

Source: Hinton et al., 2015, section 2 (https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_effnet.training.batches import Batch

# Smaller probabilities count as so much; as in Keras' cross-entropies.
_LEAST = 1e-7
# Half a step of an integer softmax: what it rounds to 0 may be as large.
_LEAST_ROUNDED = 1 / 512


def taught(teacher: keras.Model, batch: Batch) -> Batch:
    """Puts the teacher's predictions behind the labels: targets of shape `(n, 2 * classes)`."""
    predicted = ops.convert_to_numpy(teacher.predict_on_batch(batch.images))
    targets = np.concatenate([batch.targets, predicted], axis=1, dtype=np.float32)
    return batch._replace(targets=targets)


def _parts(targets: Any) -> tuple[Any, Any]:
    classes = targets.shape[-1] // 2
    return targets[:, :classes], targets[:, classes:]


@keras.saving.register_keras_serializable(package="keras_effnet")
class TaughtLoss(keras.losses.Loss):
    """The cross-entropy with the labels and the divergence from the teacher.

    Args:
        share: Weight of the teacher, in [0, 1]; the labels have the rest.
        temperature: Divides the logits of teacher and student, positive. The gradient is kept as
            large as at temperature 1.
        label_smoothing: Of the labels, in [0, 1).
        name: Name of the loss.

    Targets are those of `taught`; predictions are probabilities, `(n, classes)`.
    """

    def __init__(
        self,
        share: float,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        name: str = "taught_loss",
    ) -> None:
        super().__init__(name=name)
        self.share, self.temperature, self.label_smoothing = share, temperature, label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        labels, wanted = _parts(ops.cast(y_true, "float32"))
        y_pred = ops.cast(y_pred, "float32")
        plain = keras.losses.categorical_crossentropy(
            labels, y_pred, label_smoothing=self.label_smoothing
        )
        # Logits are logarithms of probabilities, but for a constant.
        wanted, found = (
            ops.log_softmax(ops.log(ops.maximum(part, _LEAST)) / self.temperature, axis=-1)
            for part in (wanted, y_pred)
        )
        divergence = ops.sum(ops.exp(wanted) * (wanted - found), axis=-1)
        return (1 - self.share) * plain + self.share * self.temperature**2 * divergence

    def get_config(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "temperature": self.temperature,
            "label_smoothing": self.label_smoothing,
            "name": self.name,
        }


def metrics_of(share: float) -> list[keras.metrics.Metric]:
    """Returns the accuracy by the labels, and the cross-entropy with labels and teacher."""

    def accuracy(y_true: Any, y_pred: Any) -> Any:
        return keras.metrics.categorical_accuracy(_parts(y_true)[0], y_pred)

    def cross_entropy(y_true: Any, y_pred: Any) -> Any:
        labels, wanted = _parts(ops.cast(y_true, "float32"))
        logarithms = ops.log(ops.maximum(ops.cast(y_pred, "float32"), _LEAST_ROUNDED))
        return -ops.sum(((1 - share) * labels + share * wanted) * logarithms, axis=-1)

    return [
        keras.metrics.MeanMetricWrapper(function, name=function.__name__)
        for function in (accuracy, cross_entropy)
    ]
