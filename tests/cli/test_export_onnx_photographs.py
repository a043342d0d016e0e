"""ONNX files of real trained weights, on real photographs."""

import json
import shutil
import subprocess

import keras
import numpy as np
import pytest

from keras_effnet import create_model, get_spec
from keras_effnet.cli import main
from keras_effnet.data import open_images
from keras_effnet.export import ONNXRunner, TFLiteRunner, read_onnx, to_onnx, to_tflite
from keras_effnet.quantization import QuantizationConfig, quantize_model
from keras_effnet.weights import load_weights

# Kernels of onnxruntime and of TensorFlow sum in another order.
FLOAT_TOLERANCE = 1e-4
# Of the same integers; a table of sigmoids is computed by each runtime in its own way.
MIN_AGREEMENT = 0.99
# onnxruntime-web is WebAssembly: its float kernels sum in another order again.
WEB_TOLERANCE = 1e-4
# The release whose figures are reported; `npm install` fetches it.
WEB_PACKAGE = "onnxruntime-web@1.30.0"

CASES = {
    "v2-b0": {
        "model": "EfficientNetV2B0",
        "classes": 1000,
        "weights": "weights/efficientnetv2-b0.h5",
        "photographs": "data/imagenet-sample",
        "crop": "published",
    },
    "v1-b0": {
        "model": "EfficientNetB0",
        "classes": 5,
        "weights": "weights/efficientnetb0-flowers5.h5",
        "photographs": "data/flowers",
        "crop": "center",
    },
}
# Every opset, layout and kind of batch, and every pair of a layout and a batch.
FORMS = [(13, "nhwc", False), (17, "nchw", True), (21, "nhwc", True), (21, "nchw", False)]


class Case:
    """A real model with its photographs, made once."""

    def __init__(self, name, shared):
        case = CASES[name]
        self.name, self.spec = name, get_spec(case["model"])
        self.model = create_model(self.spec, weights=None, classes=case["classes"])
        load_weights(self.model, shared(case["weights"]))
        self.folder, self.crop = shared(case["photographs"]), case["crop"]
        self.images = self.open("evaluation", 200)
        self.expected = self.model.predict(self.images, batch_size=16, verbose=0)

    def open(self, part, samples):
        images = open_images(
            self.folder / part,
            self.model.input_shape[1:3],
            preprocessing=self.spec.preprocessing,
            in_graph_preprocessing=True,
            crop=self.crop,
            samples=samples,
        )
        return np.concatenate([batch for batch, _ in images.batches(16)])

    def quantized(self):
        # Half a minute less than the best that can be had: the file is compared, not the method.
        config = QuantizationConfig(method="percentile", corrections=("swish_equalization",))
        return quantize_model(self.model, self.open("calibration", 32), config, verbose=False)


@pytest.fixture(scope="module", params=CASES)
def case(request, shared):
    yield Case(request.param, shared)
    keras.backend.clear_session()


@pytest.fixture(scope="module")
def quantized(case):
    return case.quantized()


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "layout", "dynamic"), FORMS)
def test_float_files_equal_keras(case, tmp_path, opset, layout, dynamic):
    path = tmp_path / "m.onnx"
    export = to_onnx(case.model, path, opset=opset, layout=layout, dynamic_batch=dynamic)
    assert export.file.ops.get("Transpose", 0) == (layout == "nhwc")
    assert "Reshape" not in export.file.ops
    outputs = ONNXRunner(path, threads=2).predict(case.images)
    np.testing.assert_allclose(outputs, case.expected, atol=FLOAT_TOLERANCE)
    np.testing.assert_array_equal(outputs.argmax(axis=1), case.expected.argmax(axis=1))


@pytest.mark.slow
def test_int8_files_equal_the_tflite_file(case, quantized, tmp_path):
    export = to_onnx(quantized, tmp_path / "q.onnx", quantization="int8", io_dtype="uint8")
    assert export.optimized.float_ops == {} and export.optimized.conversions == 0
    to_tflite(quantized, tmp_path / "q.tflite", quantization="int8", io_dtype="uint8")
    outputs = ONNXRunner(tmp_path / "q.onnx", threads=2).predict(case.images)
    expected = TFLiteRunner(tmp_path / "q.tflite", threads=2).predict(case.images)
    agreement = np.mean(outputs.argmax(axis=1) == expected.argmax(axis=1))
    assert agreement >= MIN_AGREEMENT
    size = (tmp_path / "q.tflite").stat().st_size
    assert export.file.size < 1.1 * size


@pytest.mark.slow
def test_the_command_exports_and_verifies(shared, tmp_path, capsys):
    output, report = tmp_path / "v2b0.onnx", tmp_path / "r.json"
    photographs = shared("data/imagenet-sample")
    argv = ["export-onnx", "--model", "EfficientNetV2B0", "--output", str(output)]
    argv += ["--weights", str(shared("weights/efficientnetv2-b0.h5")), "--report", str(report)]
    argv += ["--labels", str(photographs / "classes.csv"), "--quantization", "int8"]
    argv += ["--calibration-method", "min_max", "--corrections", "none"]
    argv += ["--calibration-data", str(photographs / "calibration"), "--calibration-samples", "32"]
    argv += ["--evaluation-data", str(photographs / "evaluation"), "--evaluation-samples", "100"]
    assert main(argv) == 0
    written = json.loads(report.read_text())
    assert written["file"]["float_ops"] == {}
    assert written["accuracy"][0]["top1"] > 0.8
    # The plainest calibration there is; that of the quantizer's own tests does better.
    assert written["accuracy"][1]["agreement"] > 0.8
    assert json.loads(read_onnx(output).metadata["labels"])[388] == "giant_panda"


NODE = """
const ort = require("onnxruntime-web");
const fs = require("fs");
ort.env.wasm.numThreads = 1;
(async () => {
  const [pixels, ...files] = process.argv.slice(2);
  const bytes = fs.readFileSync(pixels);
  const results = [];
  for (const file of files) {
    const session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(file)));
    const isFloat = file.includes("float");
    const data = isFloat ? Float32Array.from(bytes) : Uint8Array.from(bytes);
    const images = new ort.Tensor(isFloat ? "float32" : "uint8", data, [1, 224, 224, 3]);
    const { outputs } = await session.run({ images });
    results.push(Array.from(outputs.data));
  }
  console.log(JSON.stringify(results));
})();
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
def test_onnxruntime_web_gives_the_same_top5(case, quantized, shared, tmp_path, tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.getbasetemp() / "onnxruntime-web"
    if not folder.exists():
        folder.mkdir()
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", WEB_PACKAGE]
        subprocess.run(command, cwd=folder, check=True, timeout=300)
    script = folder / "run.js"
    script.write_text(NODE)
    to_onnx(case.model, tmp_path / "float.onnx")
    to_onnx(quantized, tmp_path / "int8.onnx", quantization="int8", io_dtype="uint8")
    photograph = Image.open(shared("data/panda.jpg")).convert("RGB").resize((224, 224))
    pixels = np.asarray(photograph, np.uint8)
    (tmp_path / "pixels").write_bytes(pixels.tobytes())
    files = [str(tmp_path / name) for name in ("float.onnx", "int8.onnx")]
    printed = subprocess.run(
        ["node", str(script), str(tmp_path / "pixels"), *files],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert printed.returncode == 0, printed.stderr
    web_float, web_int8 = (np.asarray(values) for values in json.loads(printed.stdout))
    images = pixels[None].astype(np.float32)
    [of_float], [of_int8] = (ONNXRunner(file).predict(images) for file in files)
    np.testing.assert_allclose(web_float, of_float, atol=WEB_TOLERANCE)
    assert top5(web_float) == top5(of_float)
    assert top5(web_int8) == top5(of_int8)
    if case.name == "v2-b0":
        assert top5(web_int8)[0] == 388


def top5(outputs):
    return np.argsort(-np.asarray(outputs, np.float64), kind="stable")[:5].tolist()
