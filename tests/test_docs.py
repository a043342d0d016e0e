"""The guides in docs/: their commands and snippets run, in order, on a tiny model."""

import re
import shlex
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_effnet.cli import check_tflite, main
from keras_effnet.export import TFLiteRunner, read_tflite
from keras_effnet.export.tflite_file import read_graph
from keras_effnet.specs import SPECS, get_spec

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = ("accuracy", "android", "coral", "raspberry_pi")
# Guides whose snippets have tests of their own.
TESTED_ELSEWHERE = ("tfmot", "training")
# What a board, a phone or a compiler runs that is not here.
NOT_HERE = ("adb", "pip")
COLOURS = {"daisy": (240, 240, 230), "rose": (220, 30, 40), "tulip": (120, 20, 200)}
SIZE = 32

needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the export needs TensorFlow"
)


def read(guide: str) -> str:
    return (DOCS / f"{guide}.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """`(language, content)` of the fenced blocks, in order; those in lists are indented."""
    found = []
    for indent, language, content in re.findall(
        r"^( *)```(\w+)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL
    ):
        lines = [line.removeprefix(indent) for line in content.splitlines(keepends=True)]
        found.append((language, "".join(lines)))
    return found


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """The folder that the guides speak of: a model, photographs, names."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part in ("train", "validation"):
        for name, colour in COLOURS.items():
            folder = Path("photos", part, name)
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = np.clip(random.normal(colour, 20, (40, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.jpg")
    shutil.copy("photos/validation/rose/1.jpg", "photo.jpg")
    Path("flowers.txt").write_text("".join(f"{name}\n" for name in COLOURS))
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(3, 1, name="stem_conv")(x)
    x = keras.layers.Activation("swish", name="stem_activation")(x)
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    outputs = keras.layers.Dense(3, "softmax", name="predictions")(x)
    model = keras.Model(inputs, outputs, name="flowers")
    # One channel for each flower, larger the nearer the colour.
    centres = np.array(list(COLOURS.values())) / 255
    kernel, bias = 8 * centres.T, -4 * (centres**2).sum(axis=1)
    model.get_layer("stem_conv").set_weights([kernel[None, None], bias])
    model.get_layer("predictions").set_weights([2 * np.eye(3), np.zeros(3)])
    model.save("flowers.keras")


def run_line(line: str) -> None:
    command, *arguments = shlex.split(line)
    if command == "keras-effnet":
        assert main(arguments) == 0, line
    elif command == "unzip":
        if shutil.which(command):
            subprocess.run([command, *arguments], check=True, stdout=subprocess.DEVNULL)
        else:
            zipfile.ZipFile(arguments[-2]).extract(arguments[-1])
    elif command == "edgetpu_compiler":
        # The compiled file has the same input and output; pycoral's stand-in runs it.
        source = Path(arguments[-1])
        shutil.copy(source, source.with_stem(f"{source.stem}_edgetpu"))
    else:
        assert command in NOT_HERE, line


def pycoral_stand_in(monkeypatch):
    """The functions of pycoral that the guide calls, on LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    def input_size(interpreter):
        _, height, width, _ = interpreter.get_input_details()[0]["shape"]
        return width, height

    def set_input(interpreter, image):
        details = interpreter.get_input_details()[0]
        assert details["dtype"] == np.uint8
        interpreter.set_tensor(details["index"], np.asarray(image)[None])

    def get_classes(interpreter, top_k):
        details = interpreter.get_output_details()[0]
        scale, zero_point = details["quantization"]
        scores = scale * (interpreter.get_tensor(details["index"])[0].astype(int) - zero_point)
        order = np.argsort(-scores)[:top_k]
        return [types.SimpleNamespace(id=int(index), score=scores[index]) for index in order]

    modules = {name: types.ModuleType(f"pycoral.{name}") for name in ("adapters", "utils")}
    modules["adapters"].common = types.SimpleNamespace(input_size=input_size, set_input=set_input)
    modules["adapters"].classify = types.SimpleNamespace(get_classes=get_classes)
    modules["utils.edgetpu"] = types.ModuleType("pycoral.utils.edgetpu")
    modules["utils.edgetpu"].make_interpreter = lambda path: Interpreter(model_path=path)
    monkeypatch.setitem(sys.modules, "pycoral", types.ModuleType("pycoral"))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"pycoral.{name}", module)


@needs_tensorflow
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs_from_top_to_bottom(workshop, monkeypatch, capsys, guide):
    if guide == "raspberry_pi":
        pytest.importorskip("onnxruntime")
    pycoral_stand_in(monkeypatch)
    names = {"__name__": guide}
    counts = {"sh": 0, "python": 0, "kotlin": 0}
    for language, content in blocks(read(guide)):
        counts[language] += 1
        if language == "sh":
            for line in content.splitlines():
                run_line(line)
        elif language == "python":
            capsys.readouterr()
            exec(compile(content, f"{guide}.md", "exec"), names)
            printed = capsys.readouterr().out
            if "photo.jpg" in content:  # A rose, and the names in the order of the scores.
                assert [line.split()[0] for line in printed.splitlines()][0] == "rose"
                assert float(printed.splitlines()[0].split()[1]) > 0.5
    assert counts["sh"] > 3
    assert counts["python"] or counts["kotlin"]


@needs_tensorflow
def test_the_android_snippets_fit_the_file(workshop):
    """Names, types and scales that the Kotlin code relies on."""
    text = read("android")
    [export] = re.findall(r"^(keras-effnet export-tflite .*--output flowers.tflite.*)$", text, re.M)
    run_line(export.partition(" --html-report")[0])
    kotlin = "\n".join(content for language, content in blocks(text) if language == "kotlin")
    graph = read_graph("flowers.tflite")
    for signature, (inputs, outputs) in graph.signatures.items():
        assert f'"{signature}",\n' in kotlin
        assert [f'mapOf<String, Any>("{name}" to input)' in kotlin for name in inputs] == [True]
        assert [f'mapOf<String, Any>("{name}" to output)' in kotlin for name in outputs] == [True]
    file = read_tflite("flowers.tflite")
    [image], [scores] = file.inputs, file.outputs
    assert (image.name, image.dtype, scores.name, scores.dtype) == (
        *("images", "uint8"),
        *("outputs", "uint8"),
    )
    assert (image.scale, image.zero_point) == ((1.0,), (0,))
    assert (scores.scale, scores.zero_point) == ((1 / 256,), (0,))
    assert "/ 256f" in kotlin and "allocateDirect(size * size * 3)" in kotlin
    # The crop of the snippet is the published one of V1 and V2-B.
    assert "size / (size + 32)" in kotlin
    assert get_spec("EfficientNetV2B0").preprocessing.crop_padding == 32
    # Pixels of one colour, as the snippet packs them.
    pixels = np.full((1, SIZE, SIZE, 3), COLOURS["tulip"], np.float32)
    assert TFLiteRunner("flowers.tflite").predict(pixels)[0].argmax() == 2


def test_the_table_of_variants_is_that_of_the_plans():
    rows = check_tflite.variant_rows(list(SPECS))
    table = read("coral").partition("<!-- variants:")[2].partition("-->")[2]
    table = table.partition("<!-- end of variants -->")[0]
    assert table.strip() == check_tflite.markdown(rows), (
        "paste the output of `keras-effnet check-tflite --variants --markdown`"
    )


@pytest.mark.parametrize("guide", TESTED_ELSEWHERE)
def test_the_commands_of_other_guides_exist(capsys, guide):
    for language, content in blocks(read(guide)):
        if language != "sh":
            continue
        for line in content.replace("\\\n", " ").splitlines():
            if not line.startswith("keras-effnet "):
                continue
            _, *arguments = shlex.split(line)
            with pytest.raises(SystemExit) as stop:
                main([arguments[0], "--help"])
            assert stop.value.code == 0, line
            text = capsys.readouterr().out
            assert all(flag in text for flag in arguments if flag.startswith("--")), line


def test_every_guide_is_tested_and_linked():
    found = {path.stem for path in DOCS.glob("*.md")}
    assert found == {*GUIDES, *TESTED_ELSEWHERE}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for guide in found:
        assert f"](docs/{guide}.md)" in readme, guide


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
    for target in re.findall(r"\]\(([^)#]+)\)", read(guide)):
        assert "://" in target or (DOCS / target).is_file(), target


def test_the_packages_are_extras_or_well_known():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for guide in GUIDES:
        for extra in re.findall(r"keras-effnet\[([\w,]+)\]", read(guide)):
            for name in extra.split(","):
                assert f'"{name}": [' in setup, name
