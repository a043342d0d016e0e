"""train, export and evaluate a small model on handwritten digits, in about two minutes

Needs no data, no download and no account: EfficientNetTiny learns the 8 x 8 digits that come with
scikit-learn, is quantized, is trained further as a quantized model (by distillation, without
labels), is exported as TFLite and ONNX, and all of them are evaluated on digits that were held out.
Into the output folder go the models, a picture of predictions and the figures as JSON.

examples:
  keras-effnet quickstart
  keras-effnet quickstart --output-dir digits --overwrite
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keras_effnet.cli import common
from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table

if TYPE_CHECKING:
    import keras
    import numpy as np

SEED = 0
_SIZE = 32
_HELD_OUT_SHARE = 0.25
_CALIBRATION_IMAGES = 200
_BATCH_SIZE = 32
_LEARNING_RATE = 3e-3
_TIMED_IMAGES = 100
_EXAMPLES_OF_EACH_DIGIT = 3
_MODEL, _PICTURE, _FIGURES = "digits.keras", "predictions.png", "results.json"
_KERAS = "Keras, with optimizer"  # Whose state makes up two thirds of that file.
_FLOAT, _INT8, _TRAINED, _ONNX = (
    "TFLite float32",
    "TFLite int8",
    "TFLite int8, QAT",
    "ONNX int8, QAT",
)
_EXPORTS = {
    _FLOAT: "digits-float32.tflite",
    _INT8: "digits-int8.tflite",
    _TRAINED: "digits-int8-qat.tflite",
    _ONNX: "digits-int8-qat.onnx",
}
# Of the training of the quantized model.
_DISTILLATION_EPOCHS = 3


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        default="quickstart-output",
        help="folder to write into (default: quickstart-output)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of an earlier run"
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=common.positive_int,
        default=12,
        help="passes over the training digits (default: 12)",
    )


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: What was evaluated.
        file: Its file's name.
        bytes: Size of the file.
        accuracy: Share of held-out digits recognised, 0..1.
        agreement: Share of them on which it chooses the digit of the Keras model, 0..1.
        milliseconds: Median time of one image.
    """

    name: str
    file: str
    bytes: int
    accuracy: float
    agreement: float
    milliseconds: float


@dataclass(frozen=True, eq=False)
class Digits:
    """scikit-learn's digits at the size of the model, float32 pixels in 0..255, three channels.

    Args:
        train_images: Shape `(n, 32, 32, 3)`.
        train_labels: 0..9, shape `(n,)`.
        held_out_images: The same of those that training and calibration never see.
        held_out_labels: The same of those.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the output folder cannot be used.
        ImportError: If scikit-learn, matplotlib, TensorFlow or LiteRT is not installed.
    """
    start = time.perf_counter()
    folder = _check_folder(args.output_dir, args.overwrite)
    seconds: dict[str, float] = {}
    with common.stage("start", "Starting TensorFlow …", seconds):
        common.start_tensorflow()
        digits = load_digits()
        _check_installed()
    _make_folder(folder, args.overwrite)
    count = len(digits.train_images)
    with common.stage("training", f"Training EfficientNetTiny on {count} digits …", seconds):
        model = train(digits, args.epochs)
    with common.stage("export", "Quantizing, training on and exporting …", seconds):
        predictors = export(model, digits, folder, args.overwrite)
    with common.stage("evaluation", "Evaluating on held-out digits …", seconds):
        rows, outputs = evaluate(predictors, digits, folder)
    with common.stage("picture", "Drawing predictions …", seconds):
        _draw(digits, outputs, folder, args.overwrite)
    _write_figures(rows, seconds, folder, args.overwrite)

    print(f"\n{len(digits.held_out_labels)} held-out digits:\n{_table(rows)}\n")
    print(f"Written to {folder}/: {_MODEL}, {', '.join(row.file for row in rows[1:])}, {_PICTURE}")
    print(f"That took {time.perf_counter() - start:.0f} seconds.")


def _check_folder(path: str, overwrite: bool) -> Path:
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-dir is a folder. Received: the file {path!r}")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(
            f"The folder {path!r} is not empty. Choose another --output-dir, or pass --overwrite "
            "to replace the files of an earlier run."
        )
    return folder


def _check_installed() -> None:
    """Raises ImportError for what only the end of the run needs, before the training."""
    from keras_effnet import plotting
    from keras_effnet.export._optional import import_litert, import_onnxruntime

    plotting.check_installed()
    import_litert()
    import_onnxruntime()


def _make_folder(folder: Path, overwrite: bool) -> None:
    """Makes the output folder, and checks that all files can be written."""
    from keras_effnet.export.files import check_target

    common.checked(folder.mkdir, parents=True, exist_ok=True)
    for file in (_MODEL, _PICTURE, _FIGURES, *_EXPORTS.values()):
        common.checked(check_target, folder / file, overwrite=overwrite)


def load_digits() -> Digits:
    """Splits scikit-learn's 1797 digits, each class in the same proportion, and enlarges them.

    Raises:
        ImportError: If scikit-learn is not installed; the message says how to install it.
    """
    import keras
    import numpy as np

    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ImportError(
            f"`scikit-learn` carries the digits ({error}). "
            'Install it with: pip install "keras-effnet[quickstart]"'
        ) from error
    digits = datasets.load_digits()
    pixels = digits.images[..., None].astype("float32") * (255 / 16)  # They hold 0..16.
    large = keras.ops.image.resize(pixels, (_SIZE, _SIZE), interpolation="bilinear")
    images = np.repeat(keras.ops.convert_to_numpy(large), 3, axis=-1)
    train_images, held_out_images, train_labels, held_out_labels = model_selection.train_test_split(
        images,
        digits.target,
        test_size=_HELD_OUT_SHARE,
        stratify=digits.target,
        random_state=SEED,
    )
    return Digits(train_images, train_labels, held_out_images, held_out_labels)


def train(digits: Digits, epochs: int) -> keras.Model:
    """Trains EfficientNetTiny from random weights on shifted, turned and zoomed digits.

    Returns:
        The trained model: float32 pixels `(batch, 32, 32, 3)` in 0..255 to 10 probabilities.
    """
    import keras
    import tensorflow as tf

    from keras_effnet.models import EfficientNetTiny

    keras.utils.set_random_seed(SEED)
    augment = keras.Sequential(
        [
            keras.layers.RandomTranslation(0.1, 0.1, fill_mode="constant"),
            keras.layers.RandomRotation(0.03, fill_mode="constant"),
            keras.layers.RandomZoom(0.1, fill_mode="constant"),
        ]
    )
    batches = (
        tf.data.Dataset.from_tensor_slices((digits.train_images, digits.train_labels))
        .shuffle(len(digits.train_images), seed=SEED)
        .batch(_BATCH_SIZE, drop_remainder=True)
        .map(lambda images, labels: (augment(images, training=True), labels))
        .prefetch(2)
    )
    model = EfficientNetTiny(weights=None, classes=10)
    model.compile(
        optimizer=keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, epochs * len(batches))
        ),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # Compiling for XLA would take longer than the training.
        jit_compile=False,
    )
    report = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: common.say(
            f"  epoch {epoch + 1}/{epochs}: loss {logs['loss']:.3f}, "
            f"accuracy {logs['accuracy']:.1%} (training digits)"
        )
    )
    # The batches shuffle themselves; asked to do it again, Keras would warn.
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[report])
    return model


Predictor = Callable[["np.ndarray"], "np.ndarray"]


def export(
    model: keras.Model, digits: Digits, folder: Path, overwrite: bool
) -> dict[tuple[str, str], Predictor]:
    """Writes the model in every form.

    Returns:
        By (name, file name), what runs each; the Keras model first.
    """
    import numpy as np

    from keras_effnet.export import ONNXRunner, TFLiteRunner, to_onnx, to_tflite
    from keras_effnet.quantization import DistillationConfig, distill, quantize_model
    from keras_effnet.quantization.files import whole

    with whole(folder / _MODEL) as temporary:
        model.save(temporary)
    predictors: dict[tuple[str, str], Predictor] = {(_KERAS, _MODEL): model.predict_on_batch}

    def add(name, source, write, runner, quantization):
        path = folder / _EXPORTS[name]
        write(source, path, quantization=quantization, overwrite=overwrite)
        predictors[name, path.name] = runner(path).predict

    add(_FLOAT, model, to_tflite, TFLiteRunner, "float32")
    calibration, others = np.split(digits.train_images, [_CALIBRATION_IMAGES])
    quantized = quantize_model(model, calibration, verbose=False)
    add(_INT8, quantized, to_tflite, TFLiteRunner, "int8")
    config = DistillationConfig(
        epochs=_DISTILLATION_EPOCHS, batch_size=_BATCH_SIZE, shift=2, flip=False, seed=SEED
    )
    # On its calibration images the quantized model seems closer than it is.
    distill(model, quantized, others, config, verbose=False)
    add(_TRAINED, quantized, to_tflite, TFLiteRunner, "int8")
    add(_ONNX, quantized, to_onnx, ONNXRunner, "int8")
    return predictors


def evaluate(
    predictors: dict[tuple[str, str], Predictor], digits: Digits, folder: Path
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Runs every form of the model on the held-out digits.

    Returns:
        The rows of the table, and by name the outputs, shape `(n, 10)`.
    """
    import numpy as np

    images, labels = digits.held_out_images, digits.held_out_labels
    outputs = {name: np.asarray(predict(images)) for (name, _), predict in predictors.items()}
    reference = outputs[_KERAS].argmax(axis=1)
    milliseconds = _median_milliseconds(predictors, images[:_TIMED_IMAGES])
    rows = []
    for name, file in predictors:
        chosen = outputs[name].argmax(axis=1)
        rows.append(
            Row(
                name=name,
                file=file,
                bytes=(folder / file).stat().st_size,
                accuracy=float(np.mean(chosen == labels)),
                agreement=float(np.mean(chosen == reference)),
                milliseconds=milliseconds[name],
            )
        )
    return rows, outputs


def _median_milliseconds(
    predictors: dict[tuple[str, str], Predictor], images: np.ndarray
) -> dict[str, float]:
    """Of one image at a time; in turns, so that a busy moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name, _ in predictors}
    for predict in predictors.values():
        predict(images[:1])  # Traces the Keras model for one image.
    for index in range(len(images)):
        for (name, _), predict in predictors.items():
            start = time.perf_counter()
            predict(images[index : index + 1])
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _draw(digits: Digits, outputs: dict[str, np.ndarray], folder: Path, overwrite: bool) -> None:
    """Some digits of each class and the mistakes of the last, smallest form of the model."""
    import numpy as np

    from keras_effnet.export.files import write_whole
    from keras_effnet.plotting import draw_predictions, png

    *_, last = outputs.values()
    chosen, labels = last.argmax(axis=1), digits.held_out_labels
    by_digit = [np.flatnonzero(labels == digit)[:_EXAMPLES_OF_EACH_DIGIT] for digit in range(10)]
    shown = [index for row in zip(*by_digit, strict=True) for index in row]
    mistakes = [index for index in np.flatnonzero(chosen != labels) if index not in shown]
    shown += mistakes[:10]
    titles = [
        str(chosen[index]) + ("" if chosen[index] == labels[index] else f", is {labels[index]}")
        for index in shown
    ]
    right = [bool(chosen[index] == labels[index]) for index in shown]
    figure = draw_predictions(digits.held_out_images[shown], titles, right)
    write_whole(folder / _PICTURE, png(figure), overwrite=overwrite)


def _write_figures(
    rows: list[Row], seconds: dict[str, float], folder: Path, overwrite: bool
) -> None:
    from keras_effnet.export.files import write_whole
    from keras_effnet.export.report import package_versions

    figures = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "versions": package_versions(),
    }
    text = json.dumps(figures, indent=2) + "\n"
    write_whole(folder / _FIGURES, text.encode(), overwrite=overwrite)


def _table(rows: list[Row]) -> str:
    cells = [("", "accuracy", "agreement", "bytes", "ms per image")]
    cells += [
        (
            row.name,
            f"{row.accuracy:.1%}",
            f"{row.agreement:.1%}",
            f"{row.bytes:,}",
            f"{row.milliseconds:.2f}",
        )
        for row in rows
    ]
    return text_table(cells)
