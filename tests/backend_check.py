"""Run by test_models in a process of its own, because Keras takes its backend at import.

Usage: backend_check.py FOLDER, which holds `NAME.weights.h5` (10 classes) and `NAME.npy` (images)
for each variant to check. Writes results.npz and trained.keras there: the predictions of every
variant, those of the tiny one after a training step and after every form of saving, and whether
each form kept its weights bit for bit.
"""

import sys
from pathlib import Path

import keras
import numpy as np

from keras_effnet import create_model

folder = Path(sys.argv[1])


def build(name, weights, images):
    return create_model(name, weights=weights, classes=10, input_shape=images.shape[1:])


results = {"backend": keras.backend.backend()}
for path in sorted(folder.glob("*.npy")):
    images = np.load(path)
    model = build(path.stem, path.with_suffix(".weights.h5"), images)
    results[path.stem] = model.predict(images, verbose=0)

name = "EfficientNetTiny"
images = np.load(folder / f"{name}.npy")
model = build(name, folder / f"{name}.weights.h5", images)
model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
results["loss"] = model.fit(images, np.array([0, 1]), verbose=0).history["loss"][0]
results["trained"] = model.predict(images, verbose=0)

model.save(folder / "trained.keras")
model.save_weights(folder / "trained.weights.h5")
from_json = keras.models.model_from_json(model.to_json())
from_json.load_weights(folder / "trained.weights.h5")
reloaded = {
    "keras": keras.models.load_model(folder / "trained.keras"),
    "weights_h5": build(name, folder / "trained.weights.h5", images),
    "json": from_json,
}
for form, loaded in reloaded.items():
    results[form] = loaded.predict(images, verbose=0)
    pairs = zip(loaded.get_weights(), model.get_weights(), strict=True)
    results[f"{form}_same_weights"] = all(np.array_equal(*pair) for pair in pairs)
np.savez(folder / "results.npz", **results)
