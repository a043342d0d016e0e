"""V1-B0 with another activation, taught by the swish model: int8 files for `latency.py`.

    python benchmarks/mobile_switch.py --output-dir DIR [--epochs N] [--activations NAME …]

Each variant begins with the weights of the swish model of real photographs and learns, in float,
that model's predictions and the labels of the training photographs, half each; the epoch that is
best on held-back ones is kept. Then it is quantized with the default on the calibration photographs
and written as `DIR/NAME.tflite`. `latency.py --file V1-B0 relu6 DIR/relu6.tflite` takes it up.
Needs the photographs and weights of ../shared beside the repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import quantization as peers

CASE = "V1-B0"
ACTIVATIONS = ("hard_swish", "relu6")
TEACHER_WEIGHT, LEARNING_RATE, MIN_AREA, VALIDATION_SHARE = 0.5, 1e-3, 0.6, 0.15


def make(activation: str, folder: Path, epochs: int) -> None:
    """Trains a variant, quantizes it and writes its file."""
    from keras_effnet import create_model, get_spec
    from keras_effnet.data import open_images
    from keras_effnet.export import to_tflite
    from keras_effnet.quantization import quantize_model
    from keras_effnet.training import AugmentationConfig, Images, Phase, TrainingConfig, train

    teacher, _, options, data = peers._open_model(CASE)
    size, classes = teacher.input_shape[1:3], teacher.output_shape[-1]
    student, saved_as = (
        create_model(get_spec(teacher.name), weights=None, classes=classes, activation=activation)
        for _ in range(2)
    )
    student.set_weights(teacher.get_weights())
    found = open_images(data / "train", size, classes=classes, **options)
    images = Images(found, classes, options["preprocessing"], crop=options["crop"])
    training, validation = images.split(VALIDATION_SHARE, seed=0)
    config = TrainingConfig(
        phases=(Phase("student", epochs, LEARNING_RATE),),
        batch_size=16,
        label_smoothing=0.0,
        teacher_weight=TEACHER_WEIGHT,
        ema=0.95,
        augmentation=AugmentationConfig(min_area=MIN_AREA),
    )
    run = folder / activation
    run.mkdir()
    result = train(student, training, validation, run, config, saved_as=saved_as, teacher=teacher)
    for row in result.history:
        print(activation, row, flush=True)
    saved_as.load_weights(run / "best.keras")
    calibration = open_images(data / "calibration", size, samples=200, **options)
    calibration = np.concatenate([batch for batch, _ in calibration.batches(peers.BATCH)])
    quantized = quantize_model(saved_as, calibration, verbose=False)
    path = folder / f"{activation}.tflite"
    to_tflite(quantized, path, quantization="int8", io_dtype="uint8")
    print(path, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6, help="(default: 6)")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    args = parser.parse_args()
    taken = [name for name in args.activations if (args.output_dir / name).exists()]
    if taken:
        sys.exit(f"{args.output_dir} holds {', '.join(taken)} already; name another --output-dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    peers._start()
    for activation in args.activations:
        make(activation, args.output_dir, args.epochs)


if __name__ == "__main__":
    main()
