import json

import keras
import numpy as np
import onnx
import pytest

from keras_effnet import create_model
from keras_effnet.cli import main
from keras_effnet.export import ONNXRunner, read_onnx
from keras_effnet.quantization import quantize_model


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    """A saved model that tells the three colours apart, small enough to convert in a second."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(3, 1, name="conv")(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(3, name="dense")(x)
    model = keras.Model(inputs, keras.layers.Softmax()(x), name="efficientnet-tiny")
    # The classes are the folders in alphabetical order: blue, green, red.
    model.get_layer("conv").set_weights([8 * np.eye(3)[None, None, :, ::-1], np.zeros(3)])
    model.get_layer("dense").set_weights([np.eye(3), np.zeros(3)])
    path = tmp_path_factory.mktemp("models") / "colours.keras"
    model.save(path)
    return path


@pytest.fixture
def run(tmp_path, colour_model):
    """Runs the command on the colour model; `name=value` gives further arguments."""

    def call(**changes):
        argv = ["export-onnx"]
        arguments = {"keras_model": colour_model, "output": tmp_path / "m.onnx"} | changes
        for name, value in arguments.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                argv.append(flag)
            elif value is not None:
                argv += [flag, str(value)]
        return main(argv)

    return call


def error_of(capsys):
    """The one line of error; stages may stand before it."""
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert lines[-1:] == errors, lines
    return errors[0]


def int8_arguments(path):
    # Four weights need no correction.
    return {"quantization": "int8", "calibration_data": path, "corrections": "none"}


def test_float_file_equals_the_model_and_the_report_says_so(run, photographs, tmp_path, capsys):
    report = tmp_path / "r.json"
    assert run(evaluation_data=photographs, report=report) == 0
    written = json.loads(report.read_text())
    keras_row, file_row = written["accuracy"]
    assert keras_row["top1"] > 0.9
    assert file_row["agreement"] == 1
    assert file_row["max_abs_difference"] < 1e-4
    file = written["file"]
    assert (file["quantization"], file["io_dtype"]) == ("float32", "float32")
    assert (file["opset"], file["layout"], file["external_data"]) == (17, "nhwc", None)
    assert file["float_ops"] == file["optimized_ops"]
    assert written["quantizer"] is None and written["warnings"] == []
    assert {"onnx", "onnxruntime", "tf2onnx"} <= set(written["versions"])
    shown = capsys.readouterr().out
    assert "m.onnx" in shown and "100.0%" in shown and "onnxruntime runs: " in shown


def test_int8_file_is_verified_and_told_of(run, photographs, tmp_path, capsys):
    report, labels = tmp_path / "r.json", tmp_path / "labels.txt"
    labels.write_text("blue\ngreen\nred\n")
    arguments = int8_arguments(photographs) | {"evaluation_data": photographs, "report": report}
    assert run(**arguments, labels=labels, opset=21, layout="nchw", dynamic_batch=True) == 0
    written = json.loads(report.read_text())
    assert written["accuracy"][1]["agreement"] == 1
    assert written["file"]["float_ops"] == {} and written["file"]["conversions"] == 0
    assert written["file"]["inputs"][0]["dtype"] == "uint8"
    assert written["file"]["inputs"][0]["shape"] == [-1, 3, 32, 32]
    assert written["file"]["opset"] == 21
    assert written["quantizer"]["name"] == "core"
    metadata = read_onnx(tmp_path / "m.onnx").metadata
    assert json.loads(metadata["labels"]) == ["blue", "green", "red"]
    transform = json.loads(metadata["preprocessing"])
    assert transform["size"] == [32, 32]
    # The model rescales by itself.
    assert (transform["scale"], transform["mean"], transform["std"]) == (1.0, [0.0] * 3, [1.0] * 3)
    assert {"interpolation", "crop_padding", "offset"} <= set(transform)
    assert "QLinearConv" in capsys.readouterr().out


def test_operators_that_stay_in_float_are_warned_of(run, photographs, tmp_path, capsys):
    arguments = int8_arguments(photographs) | {"report": tmp_path / "r.json"}
    assert run(**arguments, keep_float="conv", io_dtype="float32") == 0
    [text] = json.loads((tmp_path / "r.json").read_text())["warnings"]
    assert "operators of this int8 file in float on this processor: 1 Conv" in text
    assert "WARNING: onnxruntime computes" in capsys.readouterr().err


def test_preprocessing_outside_the_model_stands_in_the_metadata(run, tmp_path):
    keras.utils.set_random_seed(0)
    model = create_model("EfficientNetTiny", weights=None, classes=3, include_preprocessing=False)
    model.save(tmp_path / "tiny.keras")
    assert run(keras_model=tmp_path / "tiny.keras") == 0
    transform = json.loads(read_onnx(tmp_path / "m.onnx").metadata["preprocessing"])
    assert transform["scale"] == pytest.approx(1 / 255)
    assert transform["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert transform["std"] == pytest.approx([0.229, 0.224, 0.225])


def test_a_bad_file_is_warned_of_loudly(run, photographs, tmp_path, capsys, monkeypatch):
    """A file whose classes are shifted must not pass as a good one."""
    predict = ONNXRunner.predict
    monkeypatch.setattr(ONNXRunner, "predict", lambda self, x: np.roll(predict(self, x), 1, axis=1))
    assert run(evaluation_data=photographs) == 0
    assert "WARNING: The float32 file chooses" in capsys.readouterr().err


def test_a_quantized_model_is_exported_without_calibration(
    run, colour_model, photographs, tmp_path, capsys
):
    from keras_effnet.quantization import QuantizationConfig

    images = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype(np.float32)
    model = keras.models.load_model(colour_model)
    config = QuantizationConfig(corrections=())
    quantize_model(model, [images], config, verbose=False).save(tmp_path / "q.keras")
    arguments = {"keras_model": tmp_path / "q.keras", "evaluation_data": photographs}
    assert run(**arguments) == 2
    assert "is quantized: export it with --quantization int8" in error_of(capsys)
    assert run(**arguments, quantization="int8", keep_float="conv") == 2
    assert "holds its ranges: drop --keep-float" in error_of(capsys)
    assert run(**arguments, quantization="int8", activation_dtype="int8") == 0
    file = onnx.load(tmp_path / "m.onnx")
    assert {value.name for value in file.graph.input} == {"images"}


def test_weights_in_a_file_of_their_own(run, tmp_path, capsys):
    assert run(external_data=True) == 0
    assert (tmp_path / "m.onnx.data").exists()
    assert f"Weights: {tmp_path / 'm.onnx.data'}" in capsys.readouterr().out


@pytest.fixture
def no_work(monkeypatch):
    """The work starts with TensorFlow; nothing may get that far."""

    def refuse():
        raise AssertionError("the work started")

    monkeypatch.setattr("keras_effnet.cli.common.start_tensorflow", refuse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 12}, "`opset` must be a whole number from 13 to 21. Received: opset=12"),
        ({"opset": 99}, "from 13 to 21"),
        ({"io_dtype": "uint8"}, "io_dtype='uint8' needs quantization='int8'"),
        ({"activation_dtype": "int8"}, "--activation-dtype belongs to --quantization int8"),
        ({"corrections": "none"}, "--corrections belongs to --quantization int8"),
        ({"calibration_data": "."}, "--calibration-data is used by --quantization int8 alone"),
        ({"output": "missing/m.onnx"}, "no folder 'missing'"),
    ],
)
def test_wrong_arguments(run, no_work, capsys, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    assert run(**changes) == 2
    error = error_of(capsys)
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert list(tmp_path.iterdir()) == []


def test_existing_weights_are_not_replaced_unasked(run, no_work, tmp_path, capsys):
    (tmp_path / "m.onnx.data").write_text("mine")
    assert run(external_data=True) == 2
    assert "m.onnx.data' exists" in error_of(capsys)
    assert (tmp_path / "m.onnx.data").read_text() == "mine"


def test_a_read_only_file_of_weights(run, tmp_path, capsys):
    (tmp_path / "m.onnx.data").write_text("mine")
    (tmp_path / "m.onnx.data").chmod(0o444)
    assert run(external_data=True, overwrite=True) == 1
    assert "m.onnx.data' is read-only" in error_of(capsys)
    assert (tmp_path / "m.onnx.data").read_text() == "mine"
    assert not (tmp_path / "m.onnx").exists()


def test_the_converter_of_tflite_is_no_choice(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(quantizer="converter")
    assert exit_.value.code == 2
