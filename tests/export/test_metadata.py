"""Metadata: read back, by `unzip`, and by MediaPipe itself."""

import io
import json
import os
import subprocess
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from small_model import CLASSES

from keras_effnet import create_model
from keras_effnet.data import open_images, read_labels
from keras_effnet.export import (
    ModelMetadata,
    TFLiteRunner,
    add_metadata,
    check_file,
    read_metadata,
    read_tflite,
    to_tflite,
)
from keras_effnet.export.tflite_file import read_graph
from keras_effnet.quantization import QuantizationConfig, quantize_model
from keras_effnet.specs import get_spec
from keras_effnet.weights import load_weights

LABELS = tuple(f"class {index}: é" for index in range(CLASSES))
METADATA = ModelMetadata(
    name="small",
    description="Tells blotches apart.",
    version="1.2",
    license="Apache-2.0",
    author="somebody",
    mean=(127.5,),
    std=(64.0,),
    labels=LABELS,
)
CLIENT = Path(__file__).with_name("mediapipe_client.py")
ROOT = Path(__file__).resolve().parents[2]
IMAGES = 50


@pytest.fixture(scope="module", params=["float", "int8"])
def plain(request, float_bytes, int8_bytes):
    return {"float": float_bytes, "int8": int8_bytes}[request.param]


def test_is_read_back(plain):
    data = add_metadata(plain, METADATA)
    assert read_metadata(plain) is None
    assert read_metadata(data) == METADATA


def test_only_what_is_given_is_written(plain):
    bare = ModelMetadata("m", labels=None)
    data = add_metadata(plain, bare)
    assert read_metadata(data) == bare
    assert not zipfile.is_zipfile(io.BytesIO(data))


def test_labels_are_unzipped(plain, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(add_metadata(plain, METADATA))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["labels.txt"]
        # MediaPipe reads them in place.
        assert archive.getinfo("labels.txt").compress_type == zipfile.ZIP_STORED
        assert archive.read("labels.txt").decode().splitlines() == list(LABELS)


def test_the_model_stays_the_same(plain, images):
    data = add_metadata(plain, METADATA)
    before, after = read_tflite(plain), read_tflite(data)
    assert after.inputs == before.inputs and after.outputs == before.outputs
    assert after.inner == before.inner and after.op_versions == before.op_versions
    assert read_graph(data).signatures == read_graph(plain).signatures
    np.testing.assert_array_equal(
        TFLiteRunner(data).predict(images[:4]), TFLiteRunner(plain).predict(images[:4])
    )


def test_constants_are_aligned(plain):
    """XNNPACK reads kernels where they lie; the schema demands 16 bytes."""
    from keras_effnet.export._optional import import_tflite_schema

    data = add_metadata(plain, METADATA)
    model = import_tflite_schema().Model.GetRootAs(data, 0)
    address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    filled = 0
    for index in range(model.BuffersLength()):
        values = model.Buffers(index).DataAsNumpy()
        if isinstance(values, np.ndarray):
            assert (values.__array_interface__["data"][0] - address) % 16 == 0
            filled += 1
    assert filled > 10


def test_metadata_are_replaced(plain):
    once = add_metadata(plain, METADATA)
    other = ModelMetadata("other", labels=LABELS[::-1])
    twice = add_metadata(once, other)
    assert read_metadata(twice) == other
    assert len(twice) < len(once)


def test_equal_models_make_equal_files(plain):
    assert add_metadata(plain, METADATA) == add_metadata(plain, METADATA)


def test_the_signature_has_names(plain):
    assert read_graph(plain).signatures == {"serving_default": (("images",), ("outputs",))}


def test_the_exporter_writes_them(model, tmp_path):
    export = to_tflite(model, tmp_path / "m.tflite", metadata=METADATA)
    assert read_metadata(export.path) == METADATA
    assert export.file.size == export.path.stat().st_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (0.0, 1.0), "std": (1.0, 1.0)}, "one value, or one per RGB channel"),
        ({"mean": (0.0,), "std": (1.0, 1.0, 1.0)}, "one value, or one per RGB channel"),
        ({"std": (0.0,)}, "must be positive.*0.0"),
        ({"labels": ("a", " ")}, "name of one line.*' ' for class 1"),
        ({"labels": ("a\nb",)}, "name of one line"),
    ],
)
def test_metadata_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelMetadata("m", **fields)


def test_labels_of_another_number(float_bytes):
    with pytest.raises(ValueError, match=f"name 2 classes, but the file has {CLASSES}"):
        add_metadata(float_bytes, ModelMetadata("m", labels=("a", "b")))


def test_a_file_that_reads_no_images(tmp_path):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    path = to_tflite(model, tmp_path / "m.tflite").path
    with pytest.raises(ValueError, match="RGB images"):
        add_metadata(path.read_bytes(), ModelMetadata("m"))


def test_damaged_metadata_are_refused(int8_bytes):
    data = bytearray(add_metadata(int8_bytes, METADATA))
    start = data.index(b"M001") - 4
    refused = 0
    random = np.random.default_rng(0)
    for _ in range(300):
        copy = bytearray(data)
        for place in random.integers(start, start + 700, 3):
            copy[place] = random.integers(256)
        try:
            read_metadata(bytes(copy))
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
    assert refused > 30


def test_an_archive_that_explodes_is_not_unpacked(int8_bytes):
    data = io.BytesIO(add_metadata(int8_bytes, ModelMetadata("m", labels=LABELS)))
    with zipfile.ZipFile(data) as archive:
        end = archive.start_dir
        entry = archive.getinfo("labels.txt").header_offset
    bomb = io.BytesIO(data.getvalue()[:entry])
    assert end > entry
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.txt", b"a\n" * 2**24)
    with pytest.raises(ValueError, match="damaged: 'labels.txt' unpacks to 33,554,432 bytes"):
        read_metadata(bomb.getvalue())


# MediaPipe


def mediapipe_python():
    """The interpreter of MediaPipe's own environment, whose pins may conflict with ours."""
    found = os.environ.get("MEDIAPIPE_PYTHON", ROOT / ".venv-mediapipe" / "bin" / "python")
    if Path(found).exists():
        return str(found)
    message = (
        "needs MediaPipe: python3 -m venv .venv-mediapipe && "
        ".venv-mediapipe/bin/pip install mediapipe"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def classified(path, images, classes, tmp_path):
    """What MediaPipe says, checked against our runner: the same scores in the same order.

    Classes of equal scores, of which 8-bit outputs have many, come in any order.
    """
    pixels = tmp_path / "images.npy"
    np.save(pixels, np.clip(np.round(images), 0, 255).astype(np.uint8))
    number = min(5, classes)
    command = [mediapipe_python(), str(CLIENT), str(path), str(pixels), str(number)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    outputs = TFLiteRunner(path).predict(np.load(pixels).astype(np.float32))
    labels = read_metadata(path).labels
    for best, ours in zip(found, outputs, strict=True):
        scores = [score for _, score, _ in best]
        np.testing.assert_allclose(scores, np.sort(ours)[::-1][:number], rtol=0, atol=1e-6)
        for index, score, name in best:
            assert ours[index] == pytest.approx(score, abs=1e-6)
            assert name == labels[index]
    return found


@pytest.mark.slow
def test_mediapipe_reads_the_normalization(model, images, tmp_path):
    """A float model that is given standardized pixels by MediaPipe itself."""
    inputs = keras.Input(model.input_shape[1:])
    # Undoes what the metadata announce, so that pixels reach the model.
    pixels = keras.layers.Rescaling(64.0, offset=127.5)(inputs)
    wrapped = keras.Model(inputs, model(pixels))
    path = to_tflite(wrapped, tmp_path / "m.tflite", metadata=METADATA).path
    rounded = np.round(images[:8])
    np.save(tmp_path / "images.npy", rounded.astype(np.uint8))
    command = [mediapipe_python(), str(CLIENT), str(path), str(tmp_path / "images.npy"), "7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    expected = model.predict(rounded, verbose=0)
    for best, ours in zip(json.loads(result.stdout.splitlines()[-1]), expected, strict=True):
        assert len(best) == CLASSES
        for index, score, name in best:
            assert score == pytest.approx(ours[index], abs=1e-4)
            assert name == LABELS[index]


@pytest.mark.slow
def test_mediapipe_agrees_on_photographs(shared, tmp_path):
    """V2-B0 with its real weights, float and int8, as the exporter writes them."""
    spec = get_spec("EfficientNetV2B0")
    model = create_model(spec, weights=None)
    load_weights(model, shared("weights/efficientnetv2-b0.h5"))
    labels = read_labels(shared("data/imagenet-sample/classes.csv"))
    images = open_images(
        shared("data/imagenet-sample/evaluation"),
        model.input_shape[1:3],
        preprocessing=spec.preprocessing,
        labels=labels,
        samples=IMAGES,
    )
    pixels = np.concatenate([batch for batch, _ in images.batches(10)])
    assert len(pixels) == IMAGES
    metadata = ModelMetadata("EfficientNetV2B0", labels=labels.names)
    float_file = to_tflite(model, tmp_path / "float.tflite", metadata=metadata).path
    found = classified(float_file, pixels, 1000, tmp_path)
    right = [best[0][0] == label for best, label in zip(found, images.labels, strict=True)]
    assert np.mean(right) > 0.7  # Else the crop or the labels are wrong on both sides.

    config = QuantizationConfig(method="min_max", corrections=(), per_channel_head=False)
    quantized = quantize_model(model, pixels[:16], config, verbose=False)
    for target in ("generic", "coral"):
        path = tmp_path / f"{target}.tflite"
        to_tflite(
            quantized,
            path,
            quantization="int8",
            io_dtype="uint8",
            target=target,
            metadata=metadata,
        )
        found = classified(path, pixels, 1000, tmp_path)
        right = [best[0][0] == label for best, label in zip(found, images.labels, strict=True)]
        assert np.mean(right) > 0.6
        assert path.stat().st_size < 1.1 * check_file(path, "coral").parameter_bytes
