import json
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from keras_effnet.cli import main
from keras_effnet.cli.train import make_config
from keras_effnet.data import read_labels
from keras_effnet.training import read_position
from keras_effnet.training.loop import CHECKPOINT


def arguments(values):
    argv = ["train"]
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif value is not None:
            argv += [flag, str(value)]
    return argv


@pytest.fixture
def defaults(photographs, tmp_path):
    """One epoch of the classifier of EfficientNetTiny: three steps."""
    return {
        "model": "EfficientNetTiny",
        "weights": "none",
        "head_epochs": 1,
        "epochs": 0,
        "batch_size": 3,
        "train_data": photographs,
        "output_dir": tmp_path / "run",
    }


@pytest.fixture
def run(defaults):
    return lambda **changes: main(arguments(defaults | changes))


def error_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("error: "), lines
    return lines[-1]


def test_a_run_its_files_and_what_happens_to_it_next(run, tmp_path, capsys):
    assert run(size=16) == 0
    shown = capsys.readouterr()
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.keras",
        "checkpoint.npz",
        "curves.png",
        "labels.txt",
        "last.keras",
        "log.csv",
        "result.json",
        "run.json",
    ]
    assert "Training on 9 images of 3 classes, validating on 3" in shown.err
    assert "Best: " in shown.out and "log.csv" in shown.out
    assert read_labels(folder / "labels.txt").names == ("blue", "green", "red")
    result = json.loads((folder / "result.json").read_text())
    assert len(result["history"]) == 1 and result["history"][0]["phase"] == "head"
    assert result["unreadable"] == {}
    assert len((folder / "log.csv").read_text().splitlines()) == 2
    model = keras.models.load_model(folder / "best.keras")
    assert model.output_shape == (None, 3) and not model.compiled

    # Another run would overwrite it, and other settings would not go on with it.
    assert run(size=16) == 2
    assert "holds a run. Choose another one, or pass --resume" in error_of(capsys)
    assert run(size=16, batch_size=4, mixup=0.2, resume=True) == 2
    error = error_of(capsys)
    assert "config.batch_size was 3, now 4" in error
    assert "config.augmentation.mixup was 0.0, now 0.2" in error
    before = (folder / "last.keras").stat().st_mtime_ns
    assert run(size=16, checkpoint_steps=2, resume=True) == 0
    assert (folder / "last.keras").stat().st_mtime_ns > before
    assert json.loads((folder / "result.json").read_text())["history"] == result["history"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "EfficientNetB77"}, "EfficientNetB7"),
        ({"train_data": None}, "--train-data is needed"),
        ({"train_data": "none"}, "--train-data: there is no 'none'"),
        ({"validation_data": "none"}, "--validation-data: there is no 'none'"),
        ({"weights": "none.h5"}, "--weights: there is no 'none.h5'"),
        ({"head_epochs": 0}, "nothing to train with --head-epochs 0 and --epochs 0"),
        ({"validation_share": 1}, "--validation-share is between 0 and 1. Received: 1"),
        ({"magnitude": 11}, "`magnitude` must be in 0..10. Received: 11"),
        ({"ema": 1}, "`ema` must be at least 0 and below 1. Received: 1.0"),
        ({"resume": True}, "no run to resume in"),
    ],
)
def test_wrong_arguments_are_told_before_the_work(run, capsys, changes, message):
    assert run(**changes) == 2
    assert message in error_of(capsys)


def test_resume_and_overwrite_exclude_each_other(run, capsys):
    with pytest.raises(SystemExit):
        run(resume=True, overwrite=True)
    assert "not allowed with" in capsys.readouterr().err


def test_images_without_labels_and_few_images_are_refused(run, photographs, capsys):
    assert run(train_data=photographs / "red") == 2
    assert "holds images without labels" in error_of(capsys)
    assert run(batch_size=100) == 1
    assert "A batch holds 100 images, but there are only 9" in error_of(capsys)
    assert run(validation_data=photographs, validation_share=0.5) == 2
    assert "exclude each other" in error_of(capsys)


def config_from(monkeypatch, defaults, **changes):
    found = []

    def stop(args, phases):
        found.append(make_config(args, phases))
        raise ValueError("stop")

    monkeypatch.setattr("keras_effnet.cli.train.make_config", stop)
    main(arguments(defaults | changes))
    return found[0]


def test_defaults_depend_on_whether_there_are_trained_weights(monkeypatch, defaults):
    asked = {"head_epochs": None, "epochs": None}
    random = config_from(monkeypatch, defaults, **asked)
    assert [(phase.name, phase.epochs, phase.frozen) for phase in random.phases] == [
        ("stages", 10, None)
    ]
    trained = config_from(monkeypatch, defaults, weights="imagenet", **asked)
    assert [(phase.name, phase.epochs, phase.frozen) for phase in trained.phases] == [
        ("head", 3, "all"),
        ("stages", 10, 3),
    ]


def test_every_argument_reaches_the_config(monkeypatch, defaults):
    given = {
        "epochs": 2,
        "learning_rate": 0.5,
        "head_learning_rate": 0.25,
        "frozen_stages": 2,
        "freeze_batch_norms": True,
        "warm_up": 0.3,
        "weight_decay": 0.01,
        "label_smoothing": 0.2,
        "ema": 0.9,
        "class_weights": "balanced",
        "mixed_precision": "bfloat16",
        "seed": 7,
        "min_area": 0.5,
        "no_flip": True,
        "rand_augment": 3,
        "magnitude": 5,
        "mixup": 0.4,
        "cutmix": 0.6,
        "checkpoint_steps": 11,
        "strict": True,
    }
    config = config_from(monkeypatch, defaults, **given)
    head, stages = config.phases
    assert (head.learning_rate, head.frozen) == (0.25, "all")
    assert (stages.learning_rate, stages.frozen, stages.freeze_batch_norms) == (0.5, 2, True)
    for name in ("warm_up", "weight_decay", "label_smoothing", "ema", "class_weights"):
        assert getattr(config, name) == given[name]
    for name in ("mixed_precision", "seed", "checkpoint_steps", "strict"):
        assert getattr(config, name) == given[name]
    assert config.augmentation.flip is False
    for name in ("min_area", "rand_augment", "magnitude", "mixup", "cutmix"):
        assert getattr(config.augmentation, name) == given[name]


def test_tensorboard_is_missed_before_the_work(run, monkeypatch, capsys):
    monkeypatch.setattr("keras_effnet.cli.train._is_installed", lambda name: name == "tensorflow")
    assert run(tensorboard=True) == 2
    assert "--tensorboard needs tensorboard: pip install tensorboard" in error_of(capsys)


@pytest.mark.slow
def test_tensorboard_is_given_every_epoch(run, tmp_path):
    assert run(tensorboard=True) == 0
    assert len(list((tmp_path / "run" / "tensorboard").rglob("events.*"))) == 2


@pytest.mark.slow
def test_it_learns_with_everything_at_once_and_tells_of_a_broken_photograph(
    run, photographs, tmp_path, capsys
):
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    (folder / "red" / "1.jpg").write_bytes(b"no image")
    assert (
        run(
            train_data=folder,
            validation_data=photographs,
            epochs=60,
            batch_size=4,
            learning_rate=0.01,
            head_epochs=1,
            rand_augment=1,
            mixup=0.1,
            cutmix=0.1,
            ema=0.5,
            class_weights="balanced",
            mixed_precision="bfloat16",
            frozen_stages=0,
        )
        == 0
    )
    assert "1.jpg: cannot identify image file" in capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best_val_accuracy"] > 0.6
    # Two steps an epoch, of blends at a high rate: a single epoch tells little.
    losses = [row["loss"] for row in result["history"]]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    # The model that is kept computes in float32.
    model = keras.models.load_model(tmp_path / "run" / "best.keras")
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}


def process(defaults, **changes):
    argv = arguments(defaults | changes)
    code = f"import sys; from keras_effnet.cli import main; sys.exit(main({argv!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_ctrl_c_tells_how_to_resume_and_resuming_ends_with_the_same_figures(
    defaults, tmp_path, capsys
):
    defaults |= {"head_epochs": 6, "checkpoint_steps": 1, "size": 16}
    assert main(arguments(defaults | {"output_dir": tmp_path / "whole"})) == 0
    stopped = process(defaults)
    checkpoint = tmp_path / "run" / CHECKPOINT
    while not checkpoint.exists() or read_position(checkpoint).epoch < 1:
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "Stopped; the checkpoint is written. Go on with: keras-effnet train" in err
    assert err.count("--resume") == 1 and "Traceback" not in err
    assert main(arguments(defaults | {"resume": True})) == 0
    histories = [
        json.loads((tmp_path / name / "result.json").read_text())["history"]
        for name in ("whole", "run")
    ]
    for row, other in zip(*histories, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.slow
def test_a_loss_that_is_no_number_exits_with_1_and_says_where_it_began(run, tmp_path, capsys):
    assert run(head_learning_rate=1e38, head_epochs=3, warm_up=0, weight_decay=0) == 1
    error = error_of(capsys)
    assert "The loss became" in error and "of epoch" in error and "last good state" in error
    with np.load(tmp_path / "run" / CHECKPOINT) as file:
        floats = [file[name] for name in file if file[name].dtype.kind == "f"]
    assert all(np.all(np.isfinite(array)) for array in floats)


@pytest.mark.slow
def test_it_runs_on_the_backend_that_the_user_names(defaults, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    ended = process(defaults, size=16)
    _, err = ended.communicate(timeout=200)
    assert ended.returncode == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["backend"] == "torch"
