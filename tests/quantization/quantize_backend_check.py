"""Run by test_backends in a process of its own, because Keras takes its backend at import.

Usage: quantize_backend_check.py FOLDER, which holds model.keras and images.npy. Writes
quantized.keras and results.npz there: the backend and the predictions; and NAME.keras for each way
to train it, with the predictions and the losses under that name.
"""

import sys
from pathlib import Path

import keras
import numpy as np

from keras_effnet.quantization import (
    DistillationConfig,
    FreezeRanges,
    QuantizationConfig,
    distill,
    quantize_model,
    settle,
)

folder = Path(sys.argv[1])
model = keras.models.load_model(folder / "model.keras")
images = np.load(folder / "images.npy")
quantized = quantize_model(model, images, verbose=False)
quantized.save(folder / "quantized.keras")
outputs = quantized.predict(images, verbose=0)
results = {"backend": keras.backend.backend(), "outputs": outputs}

labels = np.arange(len(images)) % 6
for ranges in ("moving_average", "learned"):
    config = QuantizationConfig(training_ranges=ranges, corrections=())
    student = quantize_model(model, images, config, verbose=False)
    student.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    freeze = [FreezeRanges(6)] if ranges == "moving_average" else []
    # Losses of the same images without dropout: an epoch's own loss depends on what was dropped.
    before = student.evaluate(images, labels, verbose=0)
    student.fit(images, labels, batch_size=4, epochs=10, callbacks=freeze, verbose=0)
    settle(student)
    student.save(folder / f"{ranges}.keras")
    results[ranges] = student.predict(images, verbose=0)
    results[f"{ranges}_losses"] = [before, student.evaluate(images, labels, verbose=0)]

student = quantize_model(model, images, QuantizationConfig(corrections=()), verbose=False)
config = DistillationConfig(epochs=3, batch_size=4, learning_rate=1e-4)
result = distill(model, student, images, config, verbose=False)
student.save(folder / "distilled.keras")
results["distilled"] = student.predict(images, verbose=0)
results["distilled_losses"] = [result.before, result.after]
np.savez(folder / "results.npz", **results)
