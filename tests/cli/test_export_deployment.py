"""Targets, metadata, thresholds and the HTML report of the export commands."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_effnet.cli import exporting, main
from keras_effnet.export import check_file, read_metadata, read_tflite
from keras_effnet.quantization.analysis import Analysis, AnalysisRow
from keras_effnet.scaling import resolve


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    """A saved model that tells the three colours apart; unlike the other tests', with a head."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(3, 3, padding="same", name="conv", activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = keras.layers.Dense(3, activation="softmax", name="predictions")(x)
    model = keras.Model(inputs, outputs, name="efficientnet-tiny")
    kernel = np.zeros((3, 3, 3, 3))
    kernel[1, 1] = np.eye(3)
    model.get_layer("conv").set_weights([kernel, np.zeros(3)])
    # The classes are the folders in alphabetical order: blue, green, red.
    model.get_layer("predictions").set_weights([8 * np.eye(3)[::-1], np.zeros(3)])
    path = tmp_path_factory.mktemp("models") / "colours.keras"
    model.save(path)
    return path


@pytest.fixture
def run(colour_model, photographs, tmp_path):
    """Exports int8; returns the exit code."""

    def call(*extra, command="export-tflite", name="m.tflite"):
        argv = [command, "--keras-model", str(colour_model), "--quantization", "int8"]
        argv += ["--calibration-data", str(photographs), "--evaluation-data", str(photographs)]
        argv += ["--corrections", "none", "--output", str(tmp_path / name)]
        return main([*argv, *map(str, extra)])

    return call


def error_of(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# Targets


def test_a_coral_file_fits_and_has_a_per_tensor_head(run, tmp_path):
    report = tmp_path / "r.json"
    assert run("--target", "coral", "--report", report) == 0
    verdict = check_file(tmp_path / "m.tflite", "coral")
    assert verdict.fits and verdict.count("mapped") == len(verdict.operators)
    file = read_tflite(tmp_path / "m.tflite")
    assert file.op_versions["FULLY_CONNECTED"] == 4
    written = json.loads(report.read_text())
    assert written["quantizer"]["per_channel_head"] is False
    by_name = {entry["target"]: entry for entry in written["targets"]}
    assert list(by_name) == ["generic", "android", "coral"]
    assert by_name["coral"]["fits"] and "operators" not in by_name["coral"]


def test_without_the_target_the_head_is_per_channel(run, tmp_path):
    assert run() == 0
    assert read_tflite(tmp_path / "m.tflite").op_versions["FULLY_CONNECTED"] == 12
    assert not check_file(tmp_path / "m.tflite", "coral").fits


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--target", "coral", "--io-dtype", "float32"), "io_dtype out of"),
        (("--no-metadata", "--license", "MIT"), "--license belongs to the metadata"),
        (("--min-agreement", "95"), "`min_agreement` must be a share in 0..1. Received: 95"),
    ],
)
def test_arguments_that_do_not_fit(run, tmp_path, capsys, extra, message):
    assert run(*extra) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "m.tflite").exists()


def test_coral_needs_int8(colour_model, tmp_path, capsys):
    argv = ["export-tflite", "--keras-model", str(colour_model), "--target", "coral"]
    assert main([*argv, "--output", str(tmp_path / "m.tflite")]) == 2
    assert "target='coral' needs quantization='int8'" in error_of(capsys)


# Metadata


def test_metadata_are_written_with_the_labels(run, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("blue\ngreen\nred\n")
    extra = ("--labels", labels, "--license", "Apache-2.0", "--model-version", "2", "--name", "C")
    assert run(*extra) == 0
    metadata = read_metadata(tmp_path / "m.tflite")
    assert (metadata.name, metadata.version, metadata.license) == ("C", "2", "Apache-2.0")
    assert metadata.labels == ("blue", "green", "red")
    assert metadata.mean == (0.0,) and metadata.std == (1.0,)


def test_metadata_can_be_left_out(run, tmp_path):
    assert run("--no-metadata") == 0
    assert read_metadata(tmp_path / "m.tflite") is None


def test_metadata_tell_the_normalization_of_a_model_without_it(tmp_path, photographs):
    """The variant's own: (pixel / 255 - mean) / std as (pixel - mean') / std'."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    outputs = keras.layers.Dense(3, activation="softmax")(x)
    model = keras.Model(inputs, outputs, name="efficientnetb0")
    model.save(tmp_path / "m.keras")
    argv = ["export-tflite", "--keras-model", str(tmp_path / "m.keras")]
    assert main([*argv, "--output", str(tmp_path / "m.tflite")]) == 0
    metadata = read_metadata(tmp_path / "m.tflite")
    np.testing.assert_allclose(metadata.mean, np.multiply([0.485, 0.456, 0.406], 255), rtol=1e-5)
    np.testing.assert_allclose(metadata.std, np.multiply([0.229, 0.224, 0.225], 255), rtol=1e-5)
    # The other command undoes it: the same scores as the Keras model's.
    argv = ["evaluate", str(tmp_path / "m.keras"), str(tmp_path / "m.tflite")]
    assert main([*argv, "--data", str(photographs), "--json"]) == 0


# Thresholds


def test_a_file_that_fails_is_kept_under_another_name(run, tmp_path, capsys):
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    extra = ("--min-sqnr", "200", "--report", report, "--html-report", page)
    assert run(*extra) == 1
    line = error_of(capsys)
    assert "dB is below 200 dB" in line and "m.failed.tflite" in line
    assert "Look at the layers" in line and "docs/accuracy.md" in line
    assert not (tmp_path / "m.tflite").exists()
    assert read_tflite(tmp_path / "m.failed.tflite").inner_floats == ()
    written = json.loads(report.read_text())
    assert written["failures"] and written["file"]["path"].endswith("m.failed.tflite")
    assert written["thresholds"]["min_sqnr"] == 200
    assert {loss["layer"] for loss in written["layers"]["losses"]} <= {
        row["layer"] for row in written["layers"]["rows"]
    }
    assert "Failed: SQNR" in page.read_text()


def test_a_file_that_reaches_all_keeps_its_name(run, tmp_path):
    extra = ("--min-agreement", "0.9", "--min-top1", "0.9", "--max-top1-loss", "0.1")
    report = tmp_path / "r.json"
    assert run(*extra, "--report", report) == 0
    assert (tmp_path / "m.tflite").exists() and not (tmp_path / "m.failed.tflite").exists()
    written = json.loads(report.read_text())
    assert written["failures"] == [] and written["layers"] is None
    assert len(written["worst_images"]) == 8
    assert all(Path(image["path"]).exists() for image in written["worst_images"])


def test_a_failed_file_is_not_replaced_unasked(run, tmp_path, capsys):
    (tmp_path / "m.failed.tflite").write_text("mine")
    assert run("--min-sqnr", "200") == 2
    assert "m.failed.tflite" in error_of(capsys)
    assert run("--min-sqnr", "200", "--overwrite") == 1
    assert (tmp_path / "m.failed.tflite").read_bytes()[4:8] == b"TFL3"


def test_thresholds_on_labels_need_labels(colour_model, photographs, tmp_path, capsys):
    argv = ["export-tflite", "--keras-model", str(colour_model), "--min-top1", "0.5"]
    assert main([*argv, "--output", str(tmp_path / "m.tflite")]) == 2
    assert "--min-top1 and --max-top1-loss need --evaluation-data" in error_of(capsys)


def test_onnx_has_thresholds_too(run, tmp_path, capsys):
    page = tmp_path / "r.html"
    extra = ("--min-sqnr", "200", "--html-report", page)
    assert run(*extra, command="export-onnx", name="m.onnx") == 1
    assert "m.failed.onnx" in error_of(capsys)
    assert (tmp_path / "m.failed.onnx").exists() and not (tmp_path / "m.onnx").exists()
    assert "Devices" not in page.read_text()


# The page


def test_the_page_has_the_photographs_and_the_names(run, tmp_path):
    page = tmp_path / "r.html"
    assert run("--html-report", page) == 0
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 8
    assert "float: red" in text or "float: blue" in text or "float: green" in text
    # The figures are those of its own calibration images.
    assert "Written, with warnings." in text and "calibration images" in text
    assert "tensors and kernels: SQNR and ranges" in text
    assert len(text) < 2_000_000
    assert run("--html-report", page) == 2  # It exists.


def test_the_page_and_the_report_must_differ(run, tmp_path, capsys):
    assert run("--report", tmp_path / "r", "--html-report", tmp_path / "r") == 2
    assert "--html-report and --report are the same file" in error_of(capsys)


def test_the_page_and_the_ranges_must_differ(run, tmp_path, capsys):
    assert run("--save-ranges", tmp_path / "r", "--html-report", tmp_path / "r") == 2
    assert "--save-ranges and --html-report are the same file" in error_of(capsys)


def test_int8_bytes_are_those_of_the_plan():
    from keras_effnet import create_model

    for name in ("EfficientNetTiny", "EfficientNetLite0"):
        model = create_model(name, weights=None)
        assert (
            exporting.int8_bytes(model) == resolve(name, classes=model.output_shape[-1]).int8_bytes
        )


def test_a_layer_is_to_blame_for_what_it_loses_itself():
    def row(layer, kind, sqnr):
        return AnalysisRow(layer, layer, kind, sqnr, 0.0, 1.0, 0.0, 1.0, 1 / 255, 0, 0.0, 0)

    rows = [row("a", "tensor", 50.0), row("b", "tensor", 12.0), row("c", "tensor", 11.0)]
    rows += [row("d", "kernel", 38.0), row("d", "tensor", 11.0)]
    analysis = Analysis("m", 1, tuple(rows), (), None)
    assert exporting.noisiest_layers(analysis) == ["b", "a", "d", "c"]
