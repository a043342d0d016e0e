import json
import shutil

import keras
import numpy as np
import pytest

from keras_effnet import create_model
from keras_effnet.cli import main
from keras_effnet.export import TFLiteRunner, read_tflite
from keras_effnet.quantization import CORRECTIONS, QuantizationConfig, quantize_model
from keras_effnet.quantization.ranges import METHODS


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of EfficientNetTiny whose outputs differ from image to image."""
    keras.utils.set_random_seed(0)
    model = create_model("EfficientNetTiny", weights=None, classes=3)
    images = np.random.default_rng(0).uniform(0, 255, (16, 32, 32, 3)).astype(np.float32)
    # Batch norms without statistics of their own let the signal fade away.
    for _ in range(20):
        model(images, training=True)
    path = tmp_path_factory.mktemp("weights") / "tiny.weights.h5"
    model.save_weights(path)
    return path


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    """A saved model that tells the three colours apart, small enough to convert in a second."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(3, 1, name="conv")(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Softmax()(x), name="efficientnet-tiny")
    # The classes are the folders in alphabetical order: blue, green, red.
    model.get_layer("conv").set_weights([8 * np.eye(3)[None, None, :, ::-1], np.zeros(3)])
    path = tmp_path_factory.mktemp("models") / "colours.keras"
    model.save(path)
    return path


def call(arguments):
    argv = ["export-tflite"]
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif value is not None:
            argv += [flag, str(value)]
    return main(argv)


@pytest.fixture
def run(tmp_path, colour_model):
    """Runs the command on the colour model; `name=value` gives further arguments."""
    defaults = {"keras_model": colour_model, "output": tmp_path / "m.tflite"}
    return lambda **changes: call(defaults | changes)


@pytest.fixture
def run_variant(tmp_path, weights):
    """Runs the command on EfficientNetTiny with three classes."""
    defaults = {"model": "EfficientNetTiny", "weights": weights, "classes": 3}
    defaults["output"] = tmp_path / "m.tflite"
    return lambda **changes: call(defaults | changes)


def error_of(capsys):
    """The one line of error; stages may stand before it."""
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert lines[-1:] == errors, lines
    assert not any("Traceback" in line for line in lines)
    return errors[0]


# The job


def test_float_file_equals_the_model_and_the_report_says_so(run, photographs, tmp_path, capsys):
    report = tmp_path / "r.json"
    assert run(evaluation_data=photographs, report=report) == 0
    written = json.loads(report.read_text())
    keras_row, file_row = written["accuracy"]
    assert keras_row["name"] == "Keras model"
    # The colours were learned: agreement on constant outputs would prove nothing.
    assert keras_row["top1"] > 0.9
    assert file_row["agreement"] == 1
    assert file_row["top1"] == keras_row["top1"]
    assert 0 < file_row["max_abs_difference"] < 1e-4
    assert written["verification"] == {
        "source": str(photographs),
        "images": 12,
        "labelled": True,
        "skipped": [],
    }
    assert written["calibration"] is None
    assert written["model"]["classes"] == 3
    assert written["model"]["name"] == "efficientnet-tiny"
    assert written["command"][:2] == ["keras-effnet", "export-tflite"]
    assert written["warnings"] == []
    assert set(written["seconds"]) == {"start", "model", "images", "conversion", "verification"}
    shown = capsys.readouterr().out
    assert "m.tflite" in shown and "100.0%" in shown and "CONV_2D" in shown


def test_int8_file_is_integer_only_and_skips_a_broken_photograph(
    run, photographs, tmp_path, capsys
):
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    broken = folder / "green" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    report = tmp_path / "r.json"
    assert (
        run(
            quantization="int8",
            calibration_data=folder,
            calibration_samples=9,
            evaluation_data=folder,
            report=report,
        )
        == 0
    )
    file = read_tflite(tmp_path / "m.tflite")
    assert file.inner_floats == ()
    assert file.inputs[0].dtype == file.outputs[0].dtype == "uint8"
    written = json.loads(report.read_text())
    assert written["file"]["inner_float_tensors"] == 0
    assert written["verification"]["images"] == 11
    assert [row["path"] for row in written["verification"]["skipped"]] == [str(broken)]
    assert written["calibration"]["images"] == 9
    assert any("own calibration images" in text for text in written["warnings"])
    errors = capsys.readouterr().err
    assert f"skipped {broken}: " in errors


def test_a_bad_int8_file_is_warned_of_loudly(run, photographs, tmp_path, capsys, monkeypatch):
    """A file whose classes are shifted must not pass as a good one."""
    predict = TFLiteRunner.predict
    monkeypatch.setattr(
        TFLiteRunner, "predict", lambda self, x: np.roll(predict(self, x), 1, axis=1)
    )
    report = tmp_path / "r.json"
    assert run(evaluation_data=photographs, report=report) == 0
    [text] = json.loads(report.read_text())["warnings"]
    assert "on only 0.0% of 12 images (at least 99% are expected)" in text
    assert f"!!!\nWARNING: {text}\n!!!" in capsys.readouterr().err


def test_a_keras_model_of_another_make_is_exported_too(tmp_path, photographs, capsys):
    inputs = keras.Input((24, 20, 3))
    x = keras.layers.Conv2D(4, 3)(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x))
    keras.Model(inputs, x, name="mine").save(tmp_path / "mine.keras")
    argv = ["export-tflite", "--keras-model", str(tmp_path / "mine.keras")]
    argv += ["--output", str(tmp_path / "m.tflite"), "--evaluation-data", str(photographs)]
    assert main([*argv, "--report", str(tmp_path / "r.json")]) == 0
    assert "'mine' is no variant of this package" in capsys.readouterr().err
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["model"]["input_shape"] == [24, 20, 3]
    assert written["accuracy"][1]["agreement"] == 1


def test_a_variant_is_built_with_its_weights_and_verified_without_images(
    run_variant, weights, tmp_path
):
    report = tmp_path / "r.json"
    assert run_variant(report=report) == 0
    written = json.loads(report.read_text())
    assert written["verification"]["source"] == "random pixels"
    assert written["model"] == {
        "name": "efficientnet-tiny",
        "weights": str(weights),
        "input_shape": [32, 32, 3],
        "classes": 3,
        "parameters": create_model("EfficientNetTiny", weights=None, classes=3).count_params(),
    }
    assert 0 < written["accuracy"][1]["max_abs_difference"] < 1e-4
    assert written["file"]["ops"]["SOFTMAX"] == 1
    assert "SHAPE" not in written["file"]["ops"]


def test_a_quantized_model_is_exported_without_calibration(
    colour_model, photographs, tmp_path, capsys
):
    images = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype(np.float32)
    quantized = quantize_model(keras.models.load_model(colour_model), [images], verbose=False)
    quantized.save(tmp_path / "q.keras")
    arguments = {
        "keras_model": tmp_path / "q.keras",
        "output": tmp_path / "m.tflite",
        "evaluation_data": photographs,
        "report": tmp_path / "r.json",
    }
    assert call(arguments) == 2
    assert "is quantized: export it with --quantization int8" in error_of(capsys)
    assert call(arguments | {"quantization": "int8", "calibration_data": photographs}) == 2
    assert "holds its ranges: drop --calibration-data" in error_of(capsys)
    assert call(arguments | {"quantization": "int8", "calibration_method": "mse"}) == 2
    assert "holds its ranges: drop --calibration-method" in error_of(capsys)
    assert call(arguments | {"quantization": "int8"}) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["file"]["inner_float_tensors"] == 0
    assert written["accuracy"][0]["top1"] > 0.9
    assert written["accuracy"][1]["agreement"] == 1


def test_without_evaluation_images_the_calibration_images_are_compared_on(
    run, photographs, tmp_path
):
    assert run(**int8_arguments(photographs), io_dtype="float32", report=tmp_path / "r.json") == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["verification"]["source"] == f"{photographs} (calibration)"
    assert written["verification"]["images"] == written["calibration"]["images"] == 12
    assert written["file"]["io_dtype"] == "float32"
    assert written["file"]["inner_float_tensors"] == 0
    assert written["accuracy"][1]["top1"] is None


def test_the_quantizer_is_this_package_unless_the_converter_is_asked_for(
    run, photographs, tmp_path, capsys
):
    files = {}
    for quantizer in (None, "core", "converter"):
        report = tmp_path / f"{quantizer}.json"
        output = report.with_suffix(".tflite")
        arguments = int8_arguments(photographs) | {"output": output, "report": report}
        assert run(**arguments, quantizer=quantizer) == 0
        written = json.loads(report.read_text())
        assert written["quantizer"]["name"] == (quantizer or "core")
        assert ("quantization" in written["seconds"]) == (quantizer != "converter")
        files[quantizer] = output.read_bytes()
    assert files[None] == files["core"] != files["converter"]
    assert "Quantizing …" in capsys.readouterr().err


def test_the_arguments_of_the_quantizer_reach_it(run, photographs, tmp_path, capsys):
    report = tmp_path / "r.json"
    arguments = int8_arguments(photographs) | {"report": report, "corrections": "none"}
    assert run(**arguments, calibration_method="min_max", keep_float="conv") == 0
    written = json.loads(report.read_text())
    assert written["quantizer"]["method"] == "min_max"
    assert written["quantizer"]["corrections"] == []
    assert written["quantizer"]["keep_float"] == ["conv"]
    assert written["file"]["inner_float_tensors"] > 0
    assert "are float, as the model asks" in capsys.readouterr().err


def test_saved_ranges_give_the_same_file_without_images(run, photographs, tmp_path, capsys):
    ranges, first, second = (tmp_path / name for name in ("r.json", "1.tflite", "2.tflite"))
    arguments = {"quantization": "int8", "corrections": "none"}
    images = {"calibration_data": photographs}
    assert run(**arguments, **images, output=first, save_ranges=ranges) == 0
    assert run(**arguments, output=second, ranges=ranges) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    predictions = [TFLiteRunner(path).predict(pixels) for path in (first, second)]
    np.testing.assert_array_equal(*predictions)
    # Corrections look at images again.
    capsys.readouterr()
    assert run(quantization="int8", output=tmp_path / "3.tflite", ranges=ranges) == 2
    assert "needs --calibration-data" in error_of(capsys)
    assert run(**arguments, **images, output=ranges, save_ranges=ranges, overwrite=True) == 2
    assert "--save-ranges and --output are the same file" in error_of(capsys)
    assert run(**arguments, ranges=tmp_path / "none.json") == 2
    assert "--ranges: there is no" in error_of(capsys)
    ranges.write_text("{}")
    assert run(**arguments, ranges=ranges) == 2
    assert "must hold a 'keras_effnet calibration'" in error_of(capsys)


@pytest.mark.parametrize("names", [*CORRECTIONS, ",".join(CORRECTIONS), "none", None])
def test_each_correction_can_be_chosen(names, run, photographs, capsys, monkeypatch):
    configs = []

    def quantize(model, batches, config, verbose):
        assert len(batches) == 1 and len(next(iter(batches))) == 12
        configs.append(config)
        raise RuntimeError("enough is known")

    monkeypatch.setattr("keras_effnet.quantization.quantize_model", quantize)
    assert run(**int8_arguments(photographs), corrections=names) == 1
    assert "enough is known" in error_of(capsys)
    [config] = configs
    expected = {None: QuantizationConfig().corrections, "none": ()}
    assert config.corrections == expected.get(names, tuple((names or "").split(",")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_method": "guess"}, "`method` must be one of.*min_max.*'guess'"),
        ({"corrections": "magic"}, "`corrections`.*magic"),
    ],
)
def test_what_the_quantizer_does_not_know(
    run, no_conversion, photographs, capsys, changes, message
):
    assert run(**int8_arguments(photographs), **changes) == 2
    assert_matches(message, error_of(capsys))


def test_a_layer_that_is_not_there_cannot_stay_float(run, no_conversion, photographs, capsys):
    assert run(**int8_arguments(photographs), keep_float="cnov") == 1
    assert_matches("`keep_float` names layers.*cnov.*conv", error_of(capsys))


def test_the_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        main(["export-tflite", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in (*METHODS, *CORRECTIONS) if name not in shown] == []


# Wrong usage, told before any work


@pytest.fixture
def no_work(monkeypatch):
    """The work starts with TensorFlow; nothing may get that far."""

    def refuse():
        raise AssertionError("the work started")

    monkeypatch.setattr("keras_effnet.cli.common.start_tensorflow", refuse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "EfficientNetB9"}, "Unknown model 'EfficientNetB9'. Closest: EfficientNetB"),
        ({"weights": "missing.h5"}, "--weights: there is no 'missing.h5'"),
        ({"weights": None, "classes": 5}, "ImageNet weights have 1000 classes.*--classes 5"),
        ({"calibration_data": "missing"}, "--calibration-data: there is no 'missing'"),
        ({"evaluation_data": "missing"}, "--evaluation-data: there is no 'missing'"),
        ({"labels": "missing.txt"}, "--labels: there is no 'missing.txt'"),
        ({"calibration_data": "."}, "--calibration-data is used by --quantization int8 alone"),
        ({"calibration_samples": 3}, "--calibration-samples needs --calibration-data"),
        ({"evaluation_samples": 3}, "--evaluation-samples needs --evaluation-data"),
        ({"io_dtype": "uint8"}, "io_dtype='uint8' needs quantization='int8'"),
        ({"quantization": "int8"}, "--quantization int8 needs --calibration-data"),
        ({"quantizer": "core"}, "--quantizer belongs to --quantization int8"),
        ({"calibration_method": "mse"}, "--calibration-method belongs to --quantization int8"),
        ({"corrections": "none"}, "--corrections belongs to --quantization int8"),
        ({"keep_float": "top_conv"}, "--keep-float belongs to --quantization int8"),
        (
            {"quantization": "int8", "quantizer": "converter", "keep_float": "top_conv"},
            "--keep-float belongs to --quantizer core. Received: --quantizer converter",
        ),
        ({"output": "missing/m.tflite"}, "no folder 'missing'.*Create it first"),
        ({"output": "."}, "is a folder"),
        ({"report": "missing/r.json"}, "no folder 'missing'"),
    ],
)
def test_wrong_arguments(run_variant, no_work, capsys, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    assert run_variant(**changes) == 2
    assert_matches(message, error_of(capsys))
    assert list(tmp_path.iterdir()) == []


def assert_matches(pattern, text):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_existing_files_are_not_replaced_unasked(run, no_work, tmp_path, capsys):
    for name in ("output", "report"):
        path = tmp_path / f"{name}.file"
        path.write_text("mine")
        assert run(**{name: path}) == 2
        assert "--overwrite" in error_of(capsys)
        assert path.read_text() == "mine"


def test_report_and_output_must_differ(run, no_work, tmp_path, capsys):
    assert run(report=tmp_path / "m.tflite") == 2
    assert "--report and --output are the same file" in error_of(capsys)


def test_an_output_that_cannot_be_written(run, no_work, tmp_path, capsys, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    assert run() == 2
    assert "m.tflite': Permission denied" in error_of(capsys)


@pytest.mark.parametrize("name", ["weights", "classes", "size"])
def test_arguments_of_a_variant_do_not_fit_a_saved_model(name, tmp_path, no_work, capsys):
    (tmp_path / "mine.keras").touch()
    argv = ["export-tflite", "--keras-model", str(tmp_path / "mine.keras"), f"--{name}", "3"]
    assert main([*argv, "--output", str(tmp_path / "m.tflite")]) == 2
    assert f"--{name} belongs to --model" in error_of(capsys)


@pytest.mark.parametrize("names", ["", "stem_conv,,top_conv"])
def test_names_without_a_name(names, capsys):
    argv = ["export-tflite", "--model", "EfficientNetB0", "--output", "m.tflite"]
    with pytest.raises(SystemExit) as exit_:
        main([*argv, "--keep-float", names])
    assert exit_.value.code == 2
    assert "names separated by commas are needed" in capsys.readouterr().err


def test_either_a_variant_or_a_saved_model(tmp_path, capsys):
    for argv in ([], ["--model", "EfficientNetB0", "--keras-model", "m.keras"]):
        with pytest.raises(SystemExit) as exit_:
            main(["export-tflite", "--output", "m.tflite", *argv])
        assert exit_.value.code == 2


# Bad input, told before the conversion


@pytest.fixture
def no_conversion(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the conversion started")

    monkeypatch.setattr("keras_effnet.export.to_tflite", refuse)


def test_labels_of_another_model(run_variant, no_conversion, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("red\ngreen\n")
    assert run_variant(labels=labels) == 2
    assert "names 2 classes. Received: --classes 3" in error_of(capsys)
    labels.write_text("red\n\ngreen\n")
    assert run_variant(labels=labels) == 1
    assert "Line 2 is empty" in error_of(capsys)


def test_weights_with_another_number_of_classes(run_variant, no_conversion, capsys):
    assert run_variant(classes=4) == 2
    assert_matches("does not fit the classifier.*with 4 classes.*Pass --classes", error_of(capsys))


def test_weights_of_another_variant(run_variant, no_conversion, weights, capsys):
    assert run_variant(model="EfficientNetB0") == 1
    assert_matches("tiny.weights.h5.*efficientnetb0", error_of(capsys))


def test_weights_that_are_cut_off(run_variant, no_conversion, weights, tmp_path, capsys):
    cut = tmp_path / "cut.weights.h5"
    cut.write_bytes(weights.read_bytes()[:10_000])
    assert run_variant(weights=cut) == 1
    assert "cut.weights.h5" in error_of(capsys)


def test_weights_that_cannot_be_fetched(run_variant, no_conversion, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KERAS_EFFNET_WEIGHTS_URL", (tmp_path / "nowhere").as_uri())
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert run_variant(model="EfficientNetB0", weights="imagenet", classes=None) == 1
    assert_matches("Check the network", error_of(capsys))


def test_a_saved_model_that_cannot_be_read(tmp_path, no_conversion, capsys):
    (tmp_path / "mine.keras").write_bytes(b"no archive")
    argv = ["export-tflite", "--keras-model", str(tmp_path / "mine.keras")]
    assert main([*argv, "--output", str(tmp_path / "m.tflite")]) == 1
    assert "mine.keras' cannot be loaded as a Keras model" in error_of(capsys)


def test_a_saved_model_that_is_no_image_classifier(tmp_path, no_conversion, capsys):
    inputs = keras.Input((8, 8, 1))
    keras.Model(inputs, keras.layers.Flatten()(inputs)).save(tmp_path / "grey.keras")
    argv = ["export-tflite", "--keras-model", str(tmp_path / "grey.keras")]
    assert main([*argv, "--output", str(tmp_path / "m.tflite")]) == 1
    assert_matches(r"must read RGB images.*\(None, 8, 8, 1\)", error_of(capsys))


def int8_arguments(path):
    return {"quantization": "int8", "calibration_data": path}


def test_an_empty_folder(run, no_conversion, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(**int8_arguments(tmp_path / "empty")) == 1
    assert "holds no images" in error_of(capsys)


def test_a_mislabelled_folder(run, no_conversion, photographs, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("red\ngreen\nyellow\n")
    assert run(labels=tmp_path / "labels.txt", evaluation_data=photographs) == 1
    assert_matches("Class folders.*'blue'", error_of(capsys))


def test_a_folder_of_fewer_classes_without_labels(
    run, no_conversion, photographs, capsys, tmp_path
):
    shutil.copytree(photographs / "red", tmp_path / "some" / "red")
    assert run(evaluation_data=tmp_path / "some") == 1
    assert_matches("1 sub-folders.*3 classes.*labels file", error_of(capsys))


def test_strict_refuses_a_broken_photograph(run, no_conversion, photographs, tmp_path, capsys):
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    (folder / "red" / "0.jpg").write_bytes((folder / "red" / "0.jpg").read_bytes()[:400])
    assert run(**int8_arguments(folder), strict=True) == 1
    assert "0.jpg" in error_of(capsys)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 24, 24, 3), np.uint8), r"shape \(32, 32, 'channels'\)|\(32, 32"),
        (np.linspace(0, 1, 3 * 32 * 32 * 3).reshape(3, 32, 32, 3), "0..255"),
    ],
)
def test_calibration_data_of_another_size_or_range(
    run, no_conversion, tmp_path, capsys, images, message
):
    np.savez(tmp_path / "images.npz", images=images)
    assert run(**int8_arguments(tmp_path / "images.npz")) == 1
    assert_matches(message, error_of(capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


# Failures during the work


def test_a_full_disk_leaves_no_file(run, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert run(report=tmp_path / "r.json") == 1
    assert_matches("m.tflite.*the disk is full. Nothing was written", error_of(capsys))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_no_file(run, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tensorflow.saved_model.save", interrupt)
    assert run() == 130
    assert "interrupted" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []
