"""The commands that run or show files, on one small model as .keras, .tflite and .onnx."""

import json
import re
import resource
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_effnet.cli import check_tflite, main
from keras_effnet.cli.evaluate import confusion_matrix
from keras_effnet.export import ModelMetadata, add_metadata, pack, to_onnx, to_tflite
from keras_effnet.export._optional import import_tflite_schema
from keras_effnet.export.probe import Prober
from keras_effnet.quantization import QuantizationConfig, quantize_model

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model that tells colours apart, as .keras, .tflite (with labels) and .onnx."""
    folder = tmp_path_factory.mktemp("colours")
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(3, 1, name="conv")(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Softmax()(x), name="colours")
    model.get_layer("conv").set_weights([8 * np.eye(3)[None, None, :, ::-1], np.zeros(3)])
    paths = {kind: folder / f"m.{kind}" for kind in ("keras", "tflite", "onnx", "plain.tflite")}
    model.save(paths["keras"])
    metadata = ModelMetadata("colours", labels=COLOURS)
    to_tflite(model, paths["tflite"], metadata=metadata)
    to_tflite(model, paths["plain.tflite"])
    to_onnx(model, paths["onnx"], labels=COLOURS)
    return {kind: str(path) for kind, path in paths.items()}


def failure(capsys, code, *argv):
    assert main(list(argv)) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def output(capsys, *argv):
    assert main(list(argv)) == 0
    return capsys.readouterr().out


# evaluate


def test_three_formats_agree_on_the_same_photographs(files, photographs, capsys):
    argv = ["evaluate", files["keras"], files["tflite"], files["onnx"], "--data", str(photographs)]
    written = json.loads(output(capsys, *argv, "--json"))
    assert written["images"] == 12
    assert [Path(entry["file"]).suffix for entry in written["files"]] == [
        ".keras",
        ".tflite",
        ".onnx",
    ]
    for entry in written["files"]:
        assert entry["top1"] == entry["agreement"] == 1
        assert entry["per_class"] == {
            name: {"images": 4, "top1": 1.0} for name in ("blue", "green", "red")
        }
    assert written["files"][1]["max_abs_difference"] < 1e-5


def test_accuracy_is_counted_by_class(files, photographs, tmp_path, capsys):
    """Two of four green photographs are said to be blue."""
    lines = ["path,label"]
    for name in COLOURS:
        for index in range(4):
            label = "blue" if name == "green" and index < 2 else name
            lines.append(f"{photographs / name / f'{index}.jpg'},{label}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    picture = tmp_path / "confusion.png"
    argv = ["evaluate", files["tflite"], "--data", str(tmp_path / "list.csv"), "--per-class"]
    argv += ["--confusion-matrix", str(picture)]
    shown = output(capsys, *argv)
    assert "83.3%" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.split()}
    assert rows["blue"] == ["6", "66.7%"] and rows["green"] == ["2", "100.0%"]
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 200


def test_a_confusion_matrix_by_hand():
    outputs = np.float32([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.6, 0.4, 0]])
    shown, matrix = confusion_matrix(outputs, np.array([0, 1, 1]))
    assert shown.tolist() == [0, 1] and matrix.tolist() == [[1, 0], [1, 1]]


def test_classes_that_do_not_occur_cost_nothing():
    """A row and a column for each of the 100,000 classes would take 80 GB."""
    outputs = np.zeros((3, 100_000), np.float32)
    outputs[[0, 1, 2], [7, 7, 99_999]] = 1
    shown, matrix = confusion_matrix(outputs, np.array([7, 50_000, 99_999]))
    assert shown.tolist() == [7, 50_000, 99_999]
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(("size", "classes"), [((4096, 2048), 3), ((8, 8), 2**21)])
def test_inputs_and_outputs_of_absurd_sizes(photographs, tmp_path, capsys, size, classes):
    inputs = keras.Input((*size, 3))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    model = keras.Model(inputs, keras.layers.UpSampling1D(classes // 3)(x[..., None])[..., 0])
    path = to_tflite(model, tmp_path / "m.tflite").path
    line = failure(capsys, 1, "evaluate", str(path), "--data", str(photographs))
    assert "at most 4,194,304 pixels" in line and "at most 1,048,576 classes" in line


def test_classes_of_one_name_are_told_apart(files, photographs, tmp_path, capsys):
    data = Path(files["plain.tflite"]).read_bytes()
    path = tmp_path / "m.tflite"
    metadata = ModelMetadata("m", labels=("crane", "green", "crane"))
    path.write_bytes(add_metadata(data, metadata))
    lines = [
        "path,label",
        *(f"{photographs / name / '0.jpg'},{number}" for number, name in enumerate(COLOURS)),
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    argv = ["evaluate", str(path), "--data", str(tmp_path / "list.csv"), "--json"]
    [entry] = json.loads(output(capsys, *argv))["files"]
    assert list(entry["per_class"]) == ["crane (0)", "green", "crane (2)"]


def test_a_normalization_that_the_file_does_not_tell(photographs, tmp_path, capsys):
    """The model takes -1..1; told so it sees the colours."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(inputs))
    x = keras.layers.Dense(3, "softmax", name="dense")(x)
    model = keras.Model(inputs, x)
    model.get_layer("dense").set_weights([9 * np.eye(3)[:, ::-1], np.zeros(3)])
    path = to_tflite(model, tmp_path / "m.tflite").path
    argv = ["evaluate", str(path), "--data", str(photographs), "--json"]
    told = json.loads(output(capsys, *argv, "--mean", "127.5", "--std", "127.5"))
    assert told["files"][0]["top1"] == 1
    other = to_tflite(
        model, tmp_path / "o.tflite", metadata=ModelMetadata("m", mean=(127.5,), std=(127.5,))
    ).path
    argv[1] = str(other)
    assert json.loads(output(capsys, *argv))["files"][0]["sqnr_db"] == told["files"][0]["sqnr_db"]
    assert json.loads(output(capsys, *argv))["files"][0]["top1"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["m.txt"], "A model is a .keras, .tflite or .onnx file. Received: 'm.txt'"),
        (["missing.tflite"], "There is no file 'missing.tflite'"),
        (["{tflite}", "{tflite}"], "Each file is named once"),
        (["{tflite}", "--mean", "1"], "--mean and --std are given together"),
        (["{tflite}", "--mean", "1", "--std", "0"], "--std must be positive"),
        (["{tflite}", "--model", "EfficientNetB99"], "EfficientNetB99"),
        (["{tflite}", "--labels", "none.txt"], "--labels: there is no 'none.txt'"),
        (["{tflite}", "--confusion-matrix", "c.jpg"], "is a PNG file"),
    ],
)
def test_evaluate_refuses_arguments(files, photographs, capsys, change, message):
    argv = [text.format(**files) if text.startswith("{") else text for text in change]
    assert message in failure(capsys, 2, "evaluate", *argv, "--data", str(photographs))


def test_photographs_without_labels(files, photographs, capsys):
    line = failure(capsys, 2, "evaluate", files["tflite"], "--data", str(photographs / "red"))
    assert "holds no labels" in line and "keras-effnet predict" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("blue\ngreen\n", "names 2 classes, but .* has 3. Pass the labels of this model"),
        ("blue\n\nred\n", "Line 2 is empty"),
        ("blue\nblue\nred\n", "more than once: blue"),
        (b"\xff\xfe\x00", "UTF-8"),
        ("", "empty|no names"),
    ],
)
def test_label_files_that_cannot_be(files, photographs, tmp_path, capsys, content, message):
    path = tmp_path / "labels.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = ["evaluate", files["tflite"], "--data", str(photographs), "--labels", str(path)]
    assert re.search(message, failure(capsys, 2, *argv))


@pytest.mark.parametrize("content", ["\ufeffblue\r\ngreen\r\nred\r\n", "blue\ngreen\nred", None])
def test_label_files_of_every_editor(files, photographs, tmp_path, capsys, content):
    argv = ["evaluate", files["plain.tflite"], "--data", str(photographs), "--json"]
    if content is not None:
        path = tmp_path / "labels.txt"
        path.write_text(content, encoding="utf-8", newline="")
        argv += ["--labels", str(path)]
    assert json.loads(output(capsys, *argv))["files"][0]["top1"] == 1


def test_unreadable_photographs_are_skipped_or_refused(files, photographs, tmp_path, capsys):
    for name in COLOURS:
        (tmp_path / name).mkdir()
        good = (photographs / name / "0.jpg").read_bytes()
        (tmp_path / name / "good.jpg").write_bytes(good)
        (tmp_path / name / "half.jpg").write_bytes(good[: len(good) // 2])
        (tmp_path / name / "empty.png").write_bytes(b"")
    argv = ["evaluate", files["tflite"], "--data", str(tmp_path)]
    written = json.loads(output(capsys, *argv, "--json"))
    assert written["images"] == 3 and len(written["skipped"]) == 6
    assert "6 of 9 image files cannot be read" in failure(capsys, 1, *argv, "--strict")


def test_files_of_different_inputs(files, photographs, tmp_path, capsys):
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(inputs))
    other = to_tflite(keras.Model(inputs, x), tmp_path / "o.tflite").path
    line = failure(capsys, 2, "evaluate", files["tflite"], str(other), "--data", str(photographs))
    assert "take the same images" in line and "16 x 16" in line


def test_files_of_different_normalization_are_told_apart(files, photographs, tmp_path, capsys):
    data = Path(files["plain.tflite"]).read_bytes()
    other = tmp_path / "o.tflite"
    other.write_bytes(add_metadata(data, ModelMetadata("m", mean=(127.5,), std=(64.0,))))
    argv = ["evaluate", files["tflite"], str(other), "--data", str(photographs)]
    line = failure(capsys, 2, *argv)
    assert "pixels as they are" in line
    assert "mean 127.5, 127.5, 127.5 and std 64, 64, 64" in line


def test_a_crop_that_the_file_does_not_tell_is_said(files, photographs, capsys):
    argv = ["predict", files["tflite"], str(photographs / "red" / "0.jpg")]
    for extra, said in (
        ((), True),
        (("--model", "EfficientNetB0"), False),
        (("--crop", "center"), False),
    ):
        assert main([*argv, *extra]) == 0
        assert ("cropped as EfficientNet V1 does" in capsys.readouterr().err) == said


def test_a_model_of_another_kind(photographs, tmp_path, capsys):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    path = to_tflite(model, tmp_path / "m.tflite").path
    line = failure(capsys, 1, "evaluate", str(path), "--data", str(photographs))
    assert "must read RGB images" in line


def test_a_missing_package_is_named(files, photographs, capsys, monkeypatch):
    from keras_effnet.export import _optional

    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(_optional.importlib, "import_module", missing)
    line = failure(capsys, 1, "evaluate", files["tflite"], "--data", str(photographs))
    assert "`ai-edge-litert` is needed" in line and 'pip install "keras-effnet[tflite]"' in line


# predict


@pytest.mark.parametrize("kind", ["keras", "tflite", "onnx"])
def test_predict_names_what_it_sees(files, photographs, capsys, kind):
    argv = ["predict", files[kind], str(photographs / "red" / "0.jpg"), str(photographs / "blue")]
    rows = json.loads(output(capsys, *argv, "--json", "--top", "2"))
    assert [Path(row["photo"]).parent.name for row in rows] == ["red", *["blue"] * 4]
    best = [row["classes"][0] for row in rows]
    assert [each["index"] for each in best] == [2, 0, 0, 0, 0]
    named = ["2", *["0"] * 4] if kind == "keras" else ["red", *["blue"] * 4]
    assert [each["name"] for each in best] == named
    assert all(len(row["classes"]) == 2 and best[0]["score"] > 0.5 for row in rows)


def test_predict_shows_a_table_and_refuses_nothing(files, photographs, capsys):
    shown = output(capsys, "predict", files["tflite"], str(photographs / "green" / "1.jpg"))
    assert "green" in shown.splitlines()[2]
    line = failure(capsys, 2, "predict", files["tflite"], "nothing.jpg")
    assert "There is no photograph 'nothing.jpg'" in line
    assert main(["predict", files["tflite"], str(photographs / "red")]) == 0


# benchmark


def test_benchmark_shows_both_runtimes(files, capsys):
    argv = ["benchmark", files["tflite"], files["onnx"], "--threads", "1", "2", "--runs", "5"]
    written = json.loads(output(capsys, *argv, "--profile", "--json"))
    assert [entry["threads"] for entry in written["latency"]] == [1, 1, 2, 2]
    assert {entry["runtime"] for entry in written["latency"]} == {"LiteRT", "onnxruntime"}
    assert len(written["memory"]) == 2 and written["memory"][0]["peak"] > 1e6
    assert list(written["profile"]) == [files["onnx"]]
    shown = output(capsys, *argv, "--no-memory")
    assert "median" in shown and "peak memory" not in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{keras}"], "Only .tflite and .onnx files can be timed"),
        (["{tflite}", "{tflite}"], "Each file is named once"),
        (["{tflite}", "--profile"], "--profile needs an .onnx file"),
        (["missing.onnx"], "There is no file"),
    ],
)
def test_benchmark_refuses_arguments(files, capsys, argv, message):
    argv = [text.format(**files) if text.startswith("{") else text for text in argv]
    assert message in failure(capsys, 2, "benchmark", *argv)


# inspect


def test_inspect_shows_a_tflite_file(files, capsys):
    written = json.loads(output(capsys, "inspect", files["tflite"], "--tensors", "--json"))
    assert written["bytes"] == Path(files["tflite"]).stat().st_size
    assert {"op": "CONV_2D", "version": 1, "count": 1} in written["operators"]
    assert written["inputs"][0]["shape"] == [1, 32, 32, 3]
    assert written["metadata"]["labels"] == list(COLOURS)
    assert written["signatures"]["serving_default"]["inputs"] == ["images"]
    assert len(written["tensors"]) == sum(written["tensors_by_type"].values())
    shown = output(capsys, "inspect", files["tflite"], "--tensors")
    assert "labels: 3: blue, green, red" in shown and "float32" in shown


def test_inspect_shows_an_onnx_file(files, capsys):
    written = json.loads(output(capsys, "inspect", files["onnx"], "--json"))
    assert written["opset"] == 17 and {"op": "Conv", "count": 1} in written["operators"]
    assert "opset 17" in output(capsys, "inspect", files["onnx"])
    assert "Only .tflite and .onnx" in failure(capsys, 2, "inspect", files["keras"])
    assert "--tensors is for" in failure(capsys, 2, "inspect", files["onnx"], "--tensors")


@pytest.mark.parametrize("command", ["evaluate", "predict", "benchmark"])
def test_a_file_that_crashes_litert_is_one_line(files, photographs, tmp_path, capsys, command):
    """A convolution without a kernel; LiteRT ends the process that runs it."""
    schema = import_tflite_schema()
    model = schema.ModelT.InitFromPackedBuf(Path(files["plain.tflite"]).read_bytes(), 0)
    convolution = model.subgraphs[0].operators[0]
    assert convolution.builtinOptionsType == schema.BuiltinOptions.Conv2DOptions
    convolution.inputs = np.array([convolution.inputs[0], -1, -1], np.int32)
    path = tmp_path / "m.tflite"
    path.write_bytes(pack.pack_model(model, schema))
    more = {"evaluate": ["--data", str(photographs)], "predict": [str(photographs)]}
    line = failure(capsys, 1, command, str(path), *more.get(command, []))
    assert "LiteRT crashes on" in line and "exit code -" in line


def test_damaged_files_are_one_line(files, tmp_path, photographs, capsys):
    whole = Path(files["tflite"]).read_bytes()
    path = tmp_path / "half.tflite"
    path.write_bytes(whole[: len(whole) // 2])
    for argv in (
        ["inspect", str(path)],
        ["check-tflite", str(path)],
        ["evaluate", str(path), "--data", str(photographs)],
        ["predict", str(path), str(photographs)],
    ):
        assert "damaged TFLite file" in failure(capsys, 1, *argv)
    path.write_bytes(b"hello")
    assert "is no TFLite file" in failure(capsys, 1, "check-tflite", str(path))
    onnx = tmp_path / "half.onnx"
    onnx.write_bytes(b"hello")
    assert "no ONNX file" in failure(capsys, 1, "evaluate", str(onnx), "--data", str(photographs))


# check-tflite


def test_check_tflite_of_a_float_file(files, capsys):
    assert main(["check-tflite", files["plain.tflite"], "--target", "coral", "--json"]) == 1
    captured = capsys.readouterr()
    written = json.loads(captured.out)
    assert written["target"] == "coral" and not written["fits"]
    assert written["not_mapped"] == sum(row["count"] for row in written["histogram"])
    assert "error: coral does not take" in captured.err
    assert main(["check-tflite", files["plain.tflite"], "--target", "android"]) == 0
    shown = capsys.readouterr().out
    assert "Verdict: the target takes it" in shown and "XNNPACK 0-" in shown
    assert main(["check-tflite", files["plain.tflite"]]) == 1
    shown = capsys.readouterr().out
    assert "What to change:" in shown and "is float32" in shown and "not as it is" in shown


def test_which_variants_stay_on_the_chip(capsys):
    rows = json.loads(output(capsys, "check-tflite", "--variants", "EfficientNetB?", "--json"))
    fits = {row["name"]: row["fits_cache"] for row in rows}
    assert [name for name, fit in fits.items() if fit] == ["EfficientNetB0"]
    assert rows[0]["share"] == 1
    # By hand: of B7's 66.3 million parameters 7.7 MB are cached.
    b7 = next(row for row in rows if row["name"] == "EfficientNetB7")
    assert b7["int8_bytes"] == pytest.approx(66.7e6, rel=0.01)
    assert b7["share"] == pytest.approx(7.7 / 66.7, rel=0.02)
    assert "| `EfficientNetB0` | 224 |" in output(
        capsys, "check-tflite", "--variants", "--markdown"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Either a FILE or --variants"),
        (["m.tflite", "--variants"], "Either a FILE or --variants"),
        (["missing.tflite"], "There is no file"),
        (["--variants", "VGG*"], "No variant has a name like 'VGG*'"),
        (["{tflite}", "--markdown"], "--markdown belongs to --variants"),
    ],
)
def test_check_tflite_refuses_arguments(files, capsys, argv, message):
    argv = [text.format(**files) if text.startswith("{") else text for text in argv]
    assert message in failure(capsys, 2, "check-tflite", *argv)


def test_the_module_counts_without_a_model():
    [row] = check_tflite.variant_rows(["EfficientNetB0"])
    assert row["int8_bytes"] < 5_500_000


# completion


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands_and_their_options(capsys, tmp_path, shell):
    pytest.importorskip("shtab")
    script = output(capsys, "completion", shell)
    for word in ("check-tflite", "--confusion-matrix", "--min-agreement", "coral"):
        assert word in script
    if shell == "bash":
        path = tmp_path / "completion.bash"
        path.write_text(script)
        probe = (
            f"source {path}; COMP_WORDS=(keras-effnet check-); COMP_CWORD=1;"
            "f=$(complete -p keras-effnet | sed 's/.*-F \\([^ ]*\\).*/\\1/'); $f keras-effnet"
            " check- keras-effnet 2>/dev/null; echo ${COMPREPLY[@]}"
        )
        result = subprocess.run(["bash", "-c", probe], capture_output=True, text=True)
        assert "check-tflite" in result.stdout, result.stderr


def test_completion_names_its_package(capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "shtab", None)
    line = failure(capsys, 1, "completion", "bash")
    assert "`shtab` is needed" in line and 'pip install "keras-effnet[completion]"' in line


# Thousands of mutated files


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """A file with a few wrong bytes, words or pieces; most damage is done to its tables."""
    data = bytearray(data)
    kind = random.integers(8)
    if kind == 0:
        return bytes(data[: random.integers(len(data))])
    if kind == 1:
        place = random.integers(len(data))
        return bytes(data[:place] + random.bytes(random.integers(1, 40)) + data[place:])
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(8, len(data) - 4))
        if kind < 6:
            data[place] = random.integers(256)
        else:
            words = (0, 1, 2, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(data), len(data) - 1)
            word = int(random.choice(words)).to_bytes(4, "little")
            start = place // 4 * 4
            data[start : start + 4] = word
    return bytes(data)


def with_other_values(data: bytes, random: np.random.Generator) -> bytes:
    """A TFLite file that holds together, in which one to three values are nonsense."""
    schema = import_tflite_schema()
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    graph = model.subgraphs[0]
    numbers = (-1, 0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1)
    for _ in range(random.integers(1, 4)):
        operator = graph.operators[random.integers(len(graph.operators))]
        tensor = graph.tensors[random.integers(len(graph.tensors))]
        kind = random.integers(7)
        if kind == 0:
            operator.inputs = operator.inputs.copy()
            place = random.integers(len(operator.inputs))
            operator.inputs[place] = random.integers(-1, len(graph.tensors))
        elif kind == 1:
            operator.opcodeIndex = int(random.integers(len(model.operatorCodes)))
        elif kind == 2 and operator.builtinOptions is not None:
            for name, value in vars(operator.builtinOptions).items():
                if type(value) is int and value == 1:  # Strides, dilations and the like.
                    setattr(operator.builtinOptions, name, int(random.choice((0, 2, 3, 7))))
        elif kind == 3 and tensor.shape is not None and len(tensor.shape):
            tensor.shape = tensor.shape.copy()
            tensor.shape[random.integers(len(tensor.shape))] = random.choice(numbers)
        elif kind == 4:
            tensor.type = int(random.integers(20))
        elif kind == 5 and tensor.quantization is not None:
            scale = random.choice((0.0, -1.0, np.nan, np.inf, 1e-30))
            tensor.quantization.scale = np.full(1, scale, np.float32)
            tensor.quantization.zeroPoint = np.array([random.choice(numbers)], np.int64)
        elif kind == 6:
            tensor.buffer = int(random.integers(len(model.buffers)))
    return pack.pack_model(model, schema)


@pytest.fixture(scope="module")
def int8_file(tmp_path_factory):
    """An integer-only file with the operators of an inverted residual, metadata and labels."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3, strides=2, padding="same")(
        keras.layers.Rescaling(1 / 255)(inputs)
    )
    x = keras.layers.DepthwiseConv2D(3, padding="same")(keras.layers.Activation("swish")(x))
    gate = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = keras.layers.Conv2D(4, 1, activation="sigmoid")(gate)
    x = keras.layers.Add()([keras.layers.Multiply()([x, gate]), x])
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, "softmax")(x))
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.float32)
    config = QuantizationConfig(method="min_max", corrections=())
    quantized = quantize_model(model, images, config, verbose=False)
    path = tmp_path_factory.mktemp("int8") / "m.tflite"
    metadata = ModelMetadata("int8", labels=COLOURS)
    to_tflite(quantized, path, quantization="int8", io_dtype="uint8", metadata=metadata)
    return str(path)


FEW_AND_MANY = pytest.mark.parametrize("share", [0.05, pytest.param(1, marks=pytest.mark.slow)])


@FEW_AND_MANY
def test_mutated_tflite_files(files, int8_file, photographs, tmp_path, capsys, monkeypatch, share):
    """1,600 files through inspect, check-tflite and evaluate: an error in one line, or an answer.

    No memory explodes: the peak of this process stays within what it takes for sound files.
    """
    number = int(1600 * share)
    random = np.random.default_rng(0)
    paths = (files["tflite"], files["plain.tflite"], int8_file, int8_file)
    sources = [Path(path).read_bytes() for path in paths]
    path = tmp_path / "m.tflite"
    photos = ["--data", str(photographs), "--samples", "3", "--json"]
    codes = {command: {0: 0, 1: 0} for command in ("inspect", "check-tflite", "evaluate")}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Prober(timeout=10) as prober:
        # One process for all in place of one for each file.
        monkeypatch.setattr("keras_effnet.export.probe.check_runs", prober.check)
        for index in range(number):
            mutate = (mutated, with_other_values)[index // len(sources) % 2]
            path.write_bytes(mutate(sources[index % len(sources)], random))
            for command, arguments in (
                ("inspect", ["--json"]),
                ("check-tflite", ["--target", "android", "--json"]),
                ("evaluate", photos),
            ):
                code = main([command, str(path), *arguments])
                captured = capsys.readouterr()
                codes[command][code] += 1
                # check-tflite judges a sound file, and fails because it does not fit.
                if captured.out:
                    json.loads(captured.out)
                if code:
                    [line] = [x for x in captured.err.splitlines() if x.startswith("error: ")]
                    assert len(line) < 1000
                else:
                    assert captured.out
    for command, counts in codes.items():
        assert counts[0] > 0.02 * number and counts[1] > 0.1 * number, (command, counts)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # In KiB.
    assert after - before < 2**20


@FEW_AND_MANY
def test_mutated_photographs(files, photographs, tmp_path, capsys, share):
    """400 photographs in one folder: the readable ones are evaluated, the others named."""
    count = int(400 * share)
    random = np.random.default_rng(1)
    sources = [path.read_bytes() for path in sorted(photographs.rglob("*.jpg"))]
    picture = tmp_path / "x.png"
    Image.new("RGB", (40, 48), "red").save(picture)
    sources.append(picture.read_bytes())
    picture.unlink()
    for name in COLOURS:
        (tmp_path / "photos" / name).mkdir(parents=True)
    for number in range(count):
        source = sources[number % len(sources)]
        suffix = "png" if source[1:4] == b"PNG" else "jpg"
        folder = tmp_path / "photos" / COLOURS[number % 3]
        (folder / f"{number}.{suffix}").write_bytes(mutated(source, random))
    argv = ["evaluate", files["tflite"], "--data", str(tmp_path / "photos"), "--json"]
    written = json.loads(output(capsys, *argv))
    assert written["images"] + len(written["skipped"]) == count
    assert min(written["images"], len(written["skipped"])) > count / 8
    assert all(skipped["reason"] for skipped in written["skipped"])
