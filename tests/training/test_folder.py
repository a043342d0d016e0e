import json

import numpy as np
import pytest
import toy

from keras_effnet.plotting import png
from keras_effnet.training import differences, draw_curves, fingerprint, open_folder, write_log
from keras_effnet.training.folder import SETTINGS
from keras_effnet.training.loop import CHECKPOINT

GIVEN = {"config": {"batch_size": 32, "phases": [{"epochs": 3}]}, "backend": "tensorflow"}


def begun(path):
    open_folder(path, GIVEN)
    (path / CHECKPOINT).touch()
    return path


def test_a_folder_with_a_run_is_refused_unless_told_what_to_do(tmp_path):
    folder = begun(tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds a run. .*--resume .*--overwrite"):
        open_folder(folder, GIVEN)
    open_folder(folder, GIVEN, resume=True)
    assert (folder / CHECKPOINT).exists()
    open_folder(folder, GIVEN | {"backend": "jax"}, overwrite=True)
    assert not (folder / CHECKPOINT).exists()
    assert json.loads((folder / SETTINGS).read_text())["backend"] == "jax"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        open_folder(tmp_path, GIVEN)
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_folder(tmp_path / "thesis.txt", GIVEN)


def test_resuming_lists_all_that_differs(tmp_path):
    folder = begun(tmp_path / "run")
    other = {"config": {"batch_size": 16, "phases": [{"epochs": 3}, {"epochs": 1}]}, "new": 1}
    with pytest.raises(ValueError, match="begun with other settings") as error:
        open_folder(folder, other, resume=True)
    for text in (
        "config.batch_size was 32, now 16",
        "config.phases.1.epochs was 'nothing', now 1",
        "backend was 'tensorflow', now 'nothing'",
        "new was 'nothing', now 1",
    ):
        assert text in str(error.value)
    assert "phases.0" not in str(error.value)


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        open_folder(tmp_path / "none", GIVEN, resume=True)
    folder = begun(tmp_path / "run")
    (folder / SETTINGS).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        open_folder(folder, GIVEN, resume=True)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    folder = begun(tmp_path / "run")
    part = folder / ".part-1234-checkpoint.npz"
    part.touch()
    open_folder(folder, GIVEN, resume=True)
    assert not part.exists() and (folder / CHECKPOINT).exists()


def test_tuples_and_lists_are_the_same():
    assert differences(json.loads(json.dumps({"a": (1, 2)})), {"a": [1, 2]}) == []


def test_a_fingerprint_tells_sets_of_images_apart():
    images = toy.colour_images(12)
    first, second = images.split(0.5, 0)
    assert fingerprint(images)["images"] == 12
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) == fingerprint(images.split(0.5, 0)[0])


def history(phases):
    rows = [(name, epoch) for name, epochs in phases for epoch in range(epochs)]
    return [
        {
            "phase": name,
            "epoch": epoch + 1,
            "learning_rate": 1e-3 / (epoch + 1),
            "loss": 2 / (index + 1),
            "accuracy": 1 - 0.6 / (index + 1),
            "val_cross_entropy": 1.8 / (index + 1),
            "val_accuracy": 1 - 0.7 / (index + 1),
        }
        for index, (name, epoch) in enumerate(rows)
    ]


def test_curves_show_every_row_and_mark_the_phases():
    figure = draw_curves(history([("head", 2), ("stages", 4)]))
    losses, accuracies, rates = figure.axes
    np.testing.assert_allclose(losses.lines[0].get_ydata(), [2 / (i + 1) for i in range(6)])
    assert [text.get_text() for text in accuracies.texts] == ["head", "stages"]
    assert png(figure).startswith(b"\x89PNG")
    assert not draw_curves(history([("all", 3)])).axes[0].texts
    with pytest.raises(ValueError, match="one or more epochs"):
        draw_curves([])


def test_the_log_is_written_from_its_beginning(tmp_path):
    path = tmp_path / "log.csv"
    write_log(path, history([("head", 2)]))
    write_log(path, history([("head", 1)]))
    lines = path.read_text().splitlines()
    assert lines[0].startswith("phase,epoch,learning_rate,loss,accuracy")
    assert len(lines) == 2
