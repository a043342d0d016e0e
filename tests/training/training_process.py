"""Trains the toy in a process of its own and writes the loss of every step.

usage: training_process.py FOLDER one|devices|worker RESUME [STEPS_PER_CHECKPOINT]

The backend is that of KERAS_BACKEND; a worker reads TF_CONFIG.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import toy

from keras_effnet.training import (
    AugmentationConfig,
    Observer,
    Phase,
    TrainingConfig,
    make_replicas,
    train,
)

EPOCHS = 4


class Losses(Observer):
    """Keeps the mean loss of the epoch after each step, and slows the process down."""

    def __init__(self):
        self.losses = []

    def stepped(self, phase, epoch, step, steps, loss):
        self.losses.append(loss)
        print(len(self.losses), flush=True)


def main():
    folder, kind, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
    if kind == "devices" and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
    replicas = make_replicas(kind != "one")
    config = TrainingConfig(
        (Phase("all", EPOCHS, 1e-2),),
        batch_size=8,
        ema=0.9,
        class_weights="balanced",
        augmentation=AugmentationConfig(rand_augment=1, mixup=0.2),
        checkpoint_steps=1,
    )
    training, validation = toy.colour_images().split(0.3, seed=0)
    # Devices draw dropout for their own rows.
    dropout = 0.3 if kind == "one" and "dropout" in sys.argv else 0.0
    saved_as = toy.toy_model(dropout=dropout)
    with replicas.scope():
        model = toy.toy_model(dropout=dropout)
    model.set_weights(saved_as.get_weights())
    losses = Losses()
    result = train(
        model,
        training,
        validation,
        folder,
        config,
        saved_as=saved_as,
        replicas=replicas,
        resume=resume,
        observer=losses,
    )
    if replicas.writes:
        weights = [np.abs(weight).sum().item() for weight in model.get_weights()]
        told = {
            "losses": losses.losses,
            "history": result.history,
            "weights": weights,
            "replicas": replicas.count,
        }
        (folder / "told.json").write_text(json.dumps(told))


main()
