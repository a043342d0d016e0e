"""Run by test_backends in a process of its own, because Keras takes its backend at import.

Usage: quantize_backend_check.py FOLDER, which holds model.keras and images.npy. Writes
quantized.keras and results.npz there: the backend and the predictions.
"""

import sys
from pathlib import Path

import keras
import numpy as np

from keras_effnet.quantization import quantize_model

folder = Path(sys.argv[1])
model = keras.models.load_model(folder / "model.keras")
images = np.load(folder / "images.npy")
quantized = quantize_model(model, images, verbose=False)
quantized.save(folder / "quantized.keras")
outputs = quantized.predict(images, verbose=0)
np.savez(folder / "results.npz", backend=keras.backend.backend(), outputs=outputs)
