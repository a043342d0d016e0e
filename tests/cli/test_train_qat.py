import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from two_workers import tf_configs

from keras_effnet.cli import exporting, main, train_qat
from keras_effnet.export import Scores, TFLiteRunner, read_tflite
from keras_effnet.quantization import (
    DistillationConfig,
    QuantizationConfig,
    distillation,
    is_quantized,
    quantize_model,
)
from keras_effnet.training import Images, Replicas
from keras_effnet.training.loop import CHECKPOINT


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    """A saved model that tells the three colours apart."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(4, 1, name="conv", activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(3, name="predictions")(x)
    model = keras.Model(inputs, keras.layers.Softmax()(x), name="efficientnet-tiny")
    # The classes are the folders in alphabetical order: blue, green, red.
    colours = np.eye(3, 4)[::-1][None, None]
    model.get_layer("conv").set_weights([colours, np.zeros(4)])
    model.get_layer("predictions").set_weights([8 * np.eye(4, 3), np.zeros(3)])
    path = tmp_path_factory.mktemp("models") / "colours.keras"
    model.save(path)
    return path


@pytest.fixture
def run(tmp_path, photographs, colour_model):
    defaults = {
        "keras_model": colour_model,
        "train_data": photographs,
        "epochs": 2,
        "batch_size": 4,
        "output_dir": tmp_path / "qat",
    }

    def call(start=main, **changes):
        argv = ["train-qat"]
        for name, value in (defaults | changes).items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                argv.append(flag)
            elif value is not None:
                argv += [flag, str(value)]
        return start(argv)

    return call


def error_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("error: "), lines
    return lines[-1]


def report_of(tmp_path):
    return json.loads((tmp_path / "qat" / "report.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keras_model": "none.keras"}, "--keras-model: there is no 'none.keras'"),
        (
            {"calibration_data": ".", "validation_data": os.curdir + os.sep},
            "--calibration-data and --validation-data must differ",
        ),
        ({"weights": "none"}, "--weights belongs to --model"),
        ({"keras_model": None, "model": "EfficientNetTiny", "weights": "none"}, "Random weights"),
        ({"train_data": None}, "--train-data is needed"),
        ({"evaluation_data": "none"}, "--evaluation-data: there is no 'none'"),
        ({"temperature": 2, "teacher_weight": 0}, "--temperature is for learning from the float"),
        ({"distill": True, "ema": 1.0}, "`ema` must be in [0, 1)"),
        ({"distill": True, "validation_share": 0.5}, "--validation-share belongs to training with"),
        ({"distill": True, "teacher_weight": 0.5}, "--teacher-weight belongs to training with"),
        ({"teacher_weight": 2}, "`teacher_weight` must be in 0..1"),
        ({"distill": True, "distribute": True}, "--distribute belongs to training with labels"),
        ({"distribute": True}, "needs two or more devices, and there is one"),
        ({"distill": True, "rand_augment": 2}, "--rand-augment belongs to training with labels"),
        ({"distill": True, "min_area": 0.5}, "--min-area belongs to training with labels"),
        (
            {"distill": True, "training_ranges": "moving_average"},
            "--distill freezes no moving averages",
        ),
        ({"freeze_ranges_after": 0.5}, "belongs to --training-ranges moving_average"),
        (
            {"freeze_ranges_after": 2, "training_ranges": "moving_average"},
            "--freeze-ranges-after is in 0..1",
        ),
        ({"calibration_method": "some"}, "`method` must be one of"),
        ({"corrections": "some"}, "`corrections` must be"),
    ],
)
def test_wrong_arguments_are_told_before_the_work(run, capsys, changes, message):
    assert run(**changes) == 2
    assert message in error_of(capsys)


def test_a_quantized_model_and_one_without_softmax_are_refused(run, colour_model, tmp_path, capsys):
    model = keras.models.load_model(colour_model)
    images = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32)
    quantize_model(model, images, verbose=False).save(tmp_path / "quantized.keras")
    assert run(keras_model=tmp_path / "quantized.keras") == 2
    assert "is quantized already" in error_of(capsys)
    logits = keras.Model(model.inputs, model.get_layer("predictions").output)
    logits.save(tmp_path / "logits.keras")
    assert run(keras_model=tmp_path / "logits.keras", calibration_samples=4) == 2
    assert "needs a model that ends in a softmax" in error_of(capsys)


def check_files(tmp_path, photographs):
    folder = tmp_path / "qat"
    report = report_of(tmp_path)
    names = [row["name"] for row in report["rows"]]
    assert names == ["Keras, float", "float", "PTQ", "QAT"]
    for row in report["rows"][1:]:
        assert row["bytes"] == (folder / row["file"]).stat().st_size
    for name in ("ptq", "qat"):
        assert read_tflite(folder / f"{name}.tflite").inner_floats == ()
        assert is_quantized(keras.models.load_model(folder / f"{name}.keras"))
    # The Keras model that is kept is the file.
    images = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).round().astype(np.float32)
    kept = keras.models.load_model(folder / "qat.keras").predict(images, verbose=0)
    found = TFLiteRunner(folder / "qat.tflite").predict(images)
    np.testing.assert_allclose(found, kept, atol=1.5 / 256)
    return report


@pytest.mark.slow
def test_training_with_labels_resumes_and_reports_three_forms(
    run, photographs, tmp_path, capsys, monkeypatch
):
    given = {"training_ranges": "moving_average", "checkpoint_steps": 1, "learning_rate": 1e-2}
    given |= {"mixup": 0.0}  # The loss of blends says little: it changes with their shares.
    # PTQ tells these colours apart already; what was trained is to be kept all the same.
    monkeypatch.setattr(distillation, "is_better", lambda before, after: True)
    assert run(**given, evaluation_data=photographs) == 0
    report = check_files(tmp_path, photographs)
    # Training started from a quantized model that works already, and kept it.
    assert [row["top1"] for row in report["rows"]] == [1.0] * 4
    assert report["warnings"] == []
    history = report["training"]["history"]
    assert [row["phase"] for row in history] == ["qat", "qat"]
    assert history[0]["loss"] > history[1]["loss"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("float", "PTQ", "QAT", "agreement"))
    shutil.move(tmp_path / "qat", tmp_path / "whole")

    from keras_effnet.training import loop

    train_on_batch = loop.Replicas.train
    steps = []

    def interrupted(self, model, batch):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return train_on_batch(self, model, batch)

    monkeypatch.setattr(loop.Replicas, "train", interrupted)
    assert run(**given, evaluation_data=photographs) == 130
    assert "Go on with: keras-effnet train-qat" in capsys.readouterr().err
    assert (tmp_path / "qat" / CHECKPOINT).exists()
    assert not (tmp_path / "qat" / "qat.tflite").exists()
    assert run(**given, evaluation_data=photographs, resume=True) == 0
    resumed = report_of(tmp_path)["training"]["history"]
    for row, other in zip(history, resumed, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    files = [(tmp_path / name / "qat.tflite").read_bytes() for name in ("whole", "qat")]
    assert files[0] == files[1]

    # States that are not better than what the training began with are not kept.
    monkeypatch.setattr(distillation, "is_better", lambda before, after: False)
    no_better = given | {"output_dir": tmp_path / "no_better"}
    assert run(**no_better, evaluation_data=photographs) == 0
    ptq, qat = ((tmp_path / "no_better" / f"{name}.tflite").read_bytes() for name in ("ptq", "qat"))
    assert ptq == qat != files[0]
    assert "QAT is PTQ: no trained state was better" in capsys.readouterr().err

    # The float model's predictions are other targets than the labels; images are blended.
    monkeypatch.undo()
    given |= {
        "teacher_weight": 0.5,
        "temperature": 2,
        "mixup": 1.0,
        "output_dir": tmp_path / "taught",
    }
    assert run(**given, evaluation_data=photographs) == 0
    taught = json.loads((tmp_path / "taught" / "report.json").read_text())
    assert [row["top1"] for row in taught["rows"]] == [1.0] * 4
    assert taught["training"]["history"][0]["loss"] != history[0]["loss"]


@pytest.mark.slow
def test_distillation_needs_no_labels_and_resumes(run, photographs, tmp_path, capsys, monkeypatch):
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for path in photographs.rglob("*.jpg"):
        shutil.copy(path, unlabelled / f"{path.parent.name}{path.name}")
    assert run(train_data=unlabelled, distill=True, learning_rate=1e-3) == 0
    report = check_files(tmp_path, photographs)
    told = report["training"]["distillation"]
    assert told["after"] <= told["before"] and len(told["epochs"]) <= 2
    assert [row["top1"] for row in report["rows"]] == [None] * 4
    assert "compared on the training images" in report["warnings"][0]
    assert "divergence from the float model" in capsys.readouterr().err
    shutil.move(tmp_path / "qat", tmp_path / "whole")

    epoch, calls = distillation._Run._epoch, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch(self, *args)

    monkeypatch.setattr(distillation._Run, "_epoch", interrupted)
    given = {"train_data": unlabelled, "distill": True, "learning_rate": 1e-3}
    assert run(**given) == 0
    assert "with --resume goes on" in capsys.readouterr().err
    assert report_of(tmp_path)["training"]["distillation"]["interrupted"]
    assert run(**given, resume=True) == 0
    assert report_of(tmp_path)["training"]["distillation"] == told
    files = [(tmp_path / name / "qat.tflite").read_bytes() for name in ("whole", "qat")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("after", "is_worse"),
    [
        ({"agreement": 0.97, "top1": 0.86, "sqnr_db": 19.0}, True),
        ({"agreement": 0.97, "top1": None, "sqnr_db": 19.0}, True),
        # Other photographs at the edge, less noise.
        ({"agreement": 0.97, "top1": 0.86, "sqnr_db": 21.0}, False),
        ({"agreement": 0.97, "top1": 0.88, "sqnr_db": 19.0}, False),
        ({"agreement": 0.98, "top1": 0.86, "sqnr_db": 19.0}, False),
    ],
)
def test_a_model_that_all_figures_call_worse_is_warned_of(tmp_path, capsys, after, is_worse):
    others = {"images": 400, "top5": None, "mean_abs_difference": 0, "max_abs_difference": 0}
    labelled = None if after["top1"] is None else 0.87
    same = {"agreement": 1.0, "top1": labelled, "sqnr_db": None} | others
    scores = [Scores("Keras, float", **same), Scores("float", **same)]
    scores.append(Scores("PTQ", agreement=0.98, top1=labelled, sqnr_db=20.0, **others))
    scores.append(Scores("QAT", **after, **others))
    for name in ("float", "ptq", "qat"):
        (tmp_path / f"{name}.tflite").touch()
    job = SimpleNamespace(warnings=[], evaluated_on="photographs")
    args = SimpleNamespace(command_line=[])
    train_qat._report(args, tmp_path, tuple(scores), {}, job, QuantizationConfig(), {})
    assert ("Training made the quantized model worse" in capsys.readouterr().err) == is_worse
    assert bool(json.loads((tmp_path / "report.json").read_text())["warnings"]) == is_worse


def test_arguments_reach_the_distillation(run, photographs, monkeypatch, capsys):
    found = []

    def distill(model, quantized, images, config, verbose, checkpoint):
        found.append((config, sum(len(batch) for batch in images), verbose))
        print("shown")
        raise RuntimeError("stop")

    monkeypatch.setattr("keras_effnet.quantization.distill", distill)
    given = {"temperature": 3, "feature_weight": 0.5, "distill_mode": "block_wise", "seed": 4}
    given |= {"ema": 0.9, "mixup": 0.2}
    assert run(distill=True, no_flip=True, corrections="none", **given) == 1
    out, err = capsys.readouterr()
    # Progress is shown, beside the results: a line for each epoch where there is no terminal.
    assert "stop" in err and "shown" in err and out == ""
    expected = DistillationConfig(
        mode="block_wise",
        epochs=2,
        batch_size=4,
        learning_rate=DistillationConfig().learning_rate,
        temperature=3,
        feature_weight=0.5,
        flip=False,
        mixup=0.2,
        ema=0.9,
        seed=4,
    )
    assert found == [(expected, 12, 2)]
    found.clear()
    run(distill=True, epochs=None, batch_size=None, overwrite=True, corrections="none")
    assert found == [(DistillationConfig(), 12, 2)]


@pytest.mark.parametrize("distill", [None, True], ids=["labels", "distilled"])
def test_calibration_leaves_out_the_images_that_choose_the_best_state(
    distill, run, photographs, monkeypatch
):
    calibrated, validation = [], []
    split = Images.split

    def noted(self, *args):
        parts = split(self, *args)
        validation.extend(parts[1].paths)
        return parts

    def calibration(images, batch_size):
        calibrated.extend(images.paths)
        raise RuntimeError("stop")

    monkeypatch.setattr(Images, "split", noted)
    monkeypatch.setattr(exporting, "Calibration", calibration)
    # The same folder by another path.
    given = {"calibration_data": photographs / "red" / "..", "calibration_samples": 100}
    assert run(distill=distill, **given) == 1
    files = sorted(photographs.rglob("*.jpg"))
    if distill:
        validation = [files[i] for i in distillation.held_back(12, DistillationConfig())]
    kept = [path.resolve() for path in calibrated]
    assert 0 < len(validation) < 12
    assert kept == [path.resolve() for path in files if path not in validation]


# Sums over a batch are taken in another order, in float32.
CURVE_TOLERANCE = 1e-5
# The command where the processor counts as two devices.
TWO_DEVICES = """
import sys
import tensorflow as tf
from keras_effnet.cli import main
processor = tf.config.list_physical_devices("CPU")[0]
devices = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(processor, devices)
sys.exit(main(sys.argv[1:]))
"""
COMMAND = "import sys; from keras_effnet.cli import main; sys.exit(main(sys.argv[1:]))"


def in_process(code, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}

    def start(argv):
        return subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            env=inherited | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def in_two_processes(run, tmp_path, changes):
    """Starts two processes that train as one; `changes` are what each is told beyond that."""
    processes = []
    for index, (own, config) in enumerate(zip(changes, tf_configs(), strict=True)):
        start = in_process(COMMAND, TF_CONFIG=config)
        folder = tmp_path / f"worker{index}"
        processes.append(run(start, distribute=True, output_dir=folder, **own))
    try:
        return [(process.communicate(timeout=240)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_same_curve(folder, other):
    histories = (
        json.loads((each / "report.json").read_text())["training"]["history"]
        for each in (folder, other)
    )
    for row, expected in zip(*histories, strict=True):
        for name in ("loss", "val_cross_entropy"):
            np.testing.assert_allclose(row[name], expected[name], rtol=CURVE_TOLERANCE)


@pytest.mark.slow
def test_several_devices_train_as_one(run, tmp_path):
    given = {"training_ranges": "learned", "learning_rate": 1e-2}
    assert run(**given) == 0
    process = run(
        in_process(TWO_DEVICES), distribute=True, output_dir=tmp_path / "devices", **given
    )
    told = process.communicate(timeout=240)[1]
    assert process.returncode == 0, told[-3000:]
    assert "Training on 2 devices in 1 process" in told
    assert_same_curve(tmp_path / "devices", tmp_path / "qat")
    for told, code in in_two_processes(run, tmp_path, [given] * 2):
        assert code == 0, told[-3000:]
        assert "Training on 2 devices in 2 processes" in told
    assert_same_curve(tmp_path / "worker0", tmp_path / "qat")
    assert (tmp_path / "worker0" / "qat.tflite").exists()
    # Only the first one writes.
    assert not (tmp_path / "worker1").exists()


@pytest.mark.slow
def test_processes_that_quantize_differently_are_stopped_before_the_training(run, tmp_path):
    told = in_two_processes(run, tmp_path, [{"calibration_samples": samples} for samples in (8, 5)])
    for text, code in told:
        assert code == 2, text[-3000:]
        assert text.splitlines()[-1].startswith("error: The 2 processes hold different models.")
    assert not (tmp_path / "worker0" / "ptq.keras").exists()


def test_a_batch_that_cannot_be_divided_is_refused_at_once(run, capsys, monkeypatch, tmp_path):
    replicas = Replicas()
    replicas.count = 3
    monkeypatch.setattr("keras_effnet.training.make_replicas", lambda distribute: replicas)
    assert run(distribute=True) == 2
    assert "must be a multiple of the 3 devices. Received: 4" in error_of(capsys)
    assert not (tmp_path / "qat").exists()
