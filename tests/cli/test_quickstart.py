import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_effnet.cli import main, quickstart

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "digits.keras",
    "digits-float32.tflite",
    "digits-int8.tflite",
    "digits-int8-qat.tflite",
    "digits-int8-qat.onnx",
    "predictions.png",
    "results.json",
}

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the export needs TensorFlow"
)


@pytest.fixture(scope="module")
def digits():
    return quickstart.load_digits()


def test_digits_are_split_evenly_and_enlarged(digits):
    assert digits.train_images.shape == (1347, 32, 32, 3)
    assert digits.held_out_images.shape == (450, 32, 32, 3)
    counts = np.bincount(digits.train_labels), np.bincount(digits.held_out_labels)
    np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 0.25, atol=0.01)
    # The brightest pixels, 16 of 16, keep their value wherever four of them meet.
    assert digits.train_images.min() == 0 and 250 < digits.train_images.max() <= 255
    assert (digits.train_images[..., 0] == digits.train_images[..., 2]).all()


def test_no_held_out_digit_is_trained_on(digits):
    train = {image.tobytes() for image in digits.train_images}
    assert not any(image.tobytes() in train for image in digits.held_out_images)


def test_epochs_and_a_new_folder_are_taken_before_the_training(tmp_path, monkeypatch):
    seen = []

    def train(digits, epochs):
        seen.append((epochs, folder.is_dir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "train", train)
    folder = tmp_path / "new" / "output"
    assert main(["quickstart", "--output-dir", str(folder), "--epochs", "1"]) == 130
    assert seen == [(1, True)]


def test_a_file_is_no_output_folder(tmp_path, capsys):
    path = tmp_path / "file"
    path.touch()
    assert main(["quickstart", "--output-dir", str(path)]) == 2
    assert "--output-dir is a folder. Received: the file" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["quickstart", "--output-dir", str(tmp_path / "file" / "below")]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sklearn", "matplotlib.figure"])
def test_what_is_not_installed_is_named_before_the_training(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(quickstart, "train", lambda *_: pytest.fail("training started"))
    assert main(["quickstart", "--output-dir", str(tmp_path / "output")]) == 1
    assert 'pip install "keras-effnet[' in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_the_script_trains_an_accurate_model(digits, tmp_path, capsys):
    """As a user runs it: without arguments, in a fresh process."""
    script = ROOT / "scripts" / "quickstart.py"
    ended = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        check=True,
        timeout=1200,
        capture_output=True,
        text=True,
    )
    folder = tmp_path / "quickstart-output"
    assert {path.name for path in folder.iterdir()} == FILES
    assert "450 held-out digits" in ended.stdout and "epoch 1/" in ended.stderr

    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "Keras, with optimizer",
        "TFLite float32",
        "TFLite int8",
        "TFLite int8, QAT",
        "ONNX int8, QAT",
    ]
    model, single, integers, trained, onnx = rows
    for row in rows:
        assert row["bytes"] == (folder / row["file"]).stat().st_size
        assert row["milliseconds"] > 0
        assert f"{row['accuracy']:.1%}" in ended.stdout and f"{row['bytes']:,}" in ended.stdout
    assert model["accuracy"] >= 0.97 and single["accuracy"] >= 0.97
    assert model["agreement"] == 1 and single["agreement"] >= 0.99
    # The variant was made for int8 to work: at most one image in twenty may change its class.
    assert integers["agreement"] >= 0.95
    assert integers["bytes"] < 0.5 * single["bytes"]
    # Both runtimes compute the same integers.
    assert trained["accuracy"] == onnx["accuracy"] and trained["agreement"] == onnx["agreement"]
    # The saved model is the one that was evaluated.
    loaded = keras.saving.load_model(folder / "digits.keras")
    chosen = loaded.predict(digits.held_out_images, verbose=0).argmax(axis=1)
    right = np.mean(chosen == digits.held_out_labels)
    assert right == pytest.approx(model["accuracy"])
    with Image.open(folder / "predictions.png") as picture:
        assert picture.format == "PNG"

    # A second run refuses to touch them, before any work.
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["quickstart", "--output-dir", str(folder)]) == 2
    assert "is not empty. Choose another --output-dir, or pass --overwrite" in (
        capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
