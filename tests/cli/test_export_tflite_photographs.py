"""The main job on real photographs with real trained weights."""

import json

import pytest

from keras_effnet.cli import main
from keras_effnet.export import read_tflite

# Both models reach about 85 % on held-out photographs; 200 to 400 of them leave three points of
# sampling error. Far below, the weights or the preprocessing are wrong.
MIN_TOP1 = 0.80
# Plain conversion reaches 0.60 and 0.90; far below this the corrections do not work.
MIN_INT8_AGREEMENT = 0.93
# Relative to the float file: weights dominate, the rest is structure and the scales per channel.
MAX_SIZE = {"float16": 0.52, "dynamic": 0.32, "int8": 0.32}
# Of the other files a part of the photographs tells enough.
WHOLE, SOME = ("float32", "int8"), 60
# Float files differ from Keras in the order of sums.
FLOAT_TOLERANCE = 1e-4

ARGUMENTS = {
    "v2-b0": {
        "model": "EfficientNetV2B0",
        "weights": "weights/efficientnetv2-b0.h5",
        "labels": "data/imagenet-sample/classes.csv",
        "calibration": "data/imagenet-sample/calibration",
        "evaluation": "data/imagenet-sample/evaluation",
        "images": 200,
        "crop": "published",
        "classes": "1000",
    },
    "v1-b0": {
        "model": "EfficientNetB0",
        "weights": "weights/efficientnetb0-flowers5.h5",
        "labels": None,
        "calibration": "data/flowers/calibration",
        "evaluation": "data/flowers/evaluation",
        "images": 400,
        "crop": "center",
        "classes": "5",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_file_is_verified_on_photographs(name, shared, tmp_path, capsys):
    case = ARGUMENTS[name]
    reports = {}
    for quantization in ("float32", "float16", "dynamic", "int8"):
        output = tmp_path / f"{quantization}.tflite"
        argv = ["export-tflite", "--model", case["model"], "--classes", case["classes"]]
        argv += ["--weights", str(shared(case["weights"])), "--crop", case["crop"]]
        argv += ["--quantization", quantization, "--output", str(output)]
        argv += ["--evaluation-data", str(shared(case["evaluation"]))]
        argv += ["--report", str(output.with_suffix(".json"))]
        if quantization not in WHOLE:
            argv += ["--evaluation-samples", str(SOME)]
        if case["labels"] is not None:
            argv += ["--labels", str(shared(case["labels"]))]
        if quantization == "int8":
            argv += ["--calibration-data", str(shared(case["calibration"]))]
        assert main(argv) == 0
        reports[quantization] = json.loads(output.with_suffix(".json").read_text())

    rows = {key: report["accuracy"][1] for key, report in reports.items()}
    keras_row = reports["float32"]["accuracy"][0]
    assert keras_row["images"] == case["images"]
    assert rows["float16"]["images"] == rows["dynamic"]["images"] == SOME
    assert keras_row["top1"] > MIN_TOP1
    assert (keras_row["top5"] is None) == (case["classes"] == "5")

    assert rows["float32"]["agreement"] == 1
    assert rows["float32"]["top1"] == keras_row["top1"]
    assert 0 < rows["float32"]["max_abs_difference"] < FLOAT_TOLERANCE
    assert rows["float16"]["agreement"] > 1 - 2 / SOME
    assert rows["int8"]["agreement"] >= MIN_INT8_AGREEMENT

    float_bytes = reports["float32"]["file"]["bytes"]
    for quantization, limit in MAX_SIZE.items():
        assert reports[quantization]["file"]["bytes"] < limit * float_bytes, quantization

    file = read_tflite(tmp_path / "int8.tflite")
    assert file.inner_floats == ()
    assert file.inputs[0].dtype == file.outputs[0].dtype == "uint8"
    assert reports["int8"]["calibration"]["images"] == 200
    # A file that differs on more than one image in twenty is warned of, on the terminal and in the
    # report; one that does better needs no warning.
    warned = any("int8 file chooses" in text for text in reports["int8"]["warnings"])
    assert warned == (rows["int8"]["agreement"] < 0.95)
    assert warned == ("WARNING: The int8 file chooses" in capsys.readouterr().err)
