"""The README: its snippets run, its table is that of the specs, its commands exist."""

import re
import shlex
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_effnet import EfficientNetTiny
from keras_effnet.cli import family, main
from keras_effnet.export import read_tflite
from keras_effnet.specs import SPECS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A word of each Python snippet, by which the tests below find it.
SNIPPETS = (
    "panda.jpg",
    "replace_head",
    "features_only",
    "model.tflite",
    "quantize_model",
    "distill(",
    "photo.jpg",
    "largest_model",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def snippet(word: str) -> str:
    (found,) = (block for block in blocks("python") if word in block)
    return found


def execute(code: str, **names) -> dict:
    """Runs a snippet and returns its names."""
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_every_snippet_is_tested():
    found = blocks("python")
    assert len(found) == len(SNIPPETS)
    assert all(snippet(word) for word in SNIPPETS)


def test_the_table_is_that_of_the_specs():
    printed = family.markdown([family.row(spec) for spec in SPECS.values()])
    table = README.partition("<!-- variants:")[2].partition("-->")[2]
    table = table.partition("<!-- end of variants -->")[0]
    assert table.strip() == printed, "paste the output of `keras-effnet family --markdown`"


def test_features_and_variations():
    names = execute(snippet("features_only"))
    assert [tuple(shape) for shape in names["pyramid"].output_shape] == [
        (None, 32, 32, 40),
        (None, 16, 16, 112),
        (None, 8, 8, 320),
    ]
    assert not any("se_" in layer.name for layer in names["mobile"].layers)
    assert names["depth_camera"].input_shape == (None, 224, 224, 4)


def test_scaling(capsys):
    found = execute(snippet("largest_model"))["found"]
    assert found.plan.multiply_adds <= 100e6 and found.plan.int8_bytes <= 3e6
    # The model in the snippet has 10 classes, the plan the 1000 of the default.
    assert str(found.plan.multiply_adds) in capsys.readouterr().out


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the export needs TensorFlow")
def test_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = EfficientNetTiny(weights=None, classes=10)
    execute(snippet("model.tflite"), model=model)
    assert (tmp_path / "model.tflite").stat().st_size > 2 * model.count_params()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small model, and images in the folder and the file that the snippets read."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    Path("flowers").mkdir()
    for index in range(4):
        pixels = random.integers(0, 256, (40, 48, 3)).astype("uint8")
        Image.fromarray(pixels).save(f"flowers/{index}.jpg")
    shutil.copy("flowers/0.jpg", "photo.jpg")
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, "softmax", name="dense")(x))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the export needs TensorFlow")
def test_int8(small):
    names = execute(snippet("quantize_model"), model=small)
    assert Path("flowers_int8.keras").exists()
    assert read_tflite("flowers_int8.tflite").inner_floats == ()
    for index in range(4):
        Image.open(f"flowers/{index}.jpg").rotate(180).save(f"flowers/more{index}.jpg")
    names = execute(snippet("distill("), **names)
    assert len(names["images"]) == 4
    assert names["result"].after <= names["result"].before
    assert read_tflite("flowers_qat.tflite").inner_floats == ()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the export needs TensorFlow")
def test_onnx_runs_without_this_package(small, capsys):
    pytest.importorskip("onnxruntime")
    small.save("small.keras")
    Path("labels.txt").write_text("rose\ntulip\ndaisy\n")
    command = "export-onnx --keras-model small.keras --quantization int8 --labels labels.txt"
    command += " --calibration-data flowers --output flowers.onnx"
    assert main(command.split()) == 0
    capsys.readouterr()
    execute(snippet("photo.jpg"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(name for name, _ in lines) == ["daisy", "rose", "tulip"]
    # Probabilities in steps of 1/256.
    assert sum(float(score) for _, score in lines) == pytest.approx(1, abs=3 / 256)


def test_commands_are_one_line_each_and_name_what_exists(capsys):
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    fresh = [line for line in commands if line.startswith("python3 -m venv .venv && ")]
    ran = [shlex.split(line.rpartition(" && ")[2]) for line in fresh]
    assert [words[1:] for words in ran] == [
        ["quickstart"],
        ["-m", "pytest", "-n", "2", "--dist", "loadfile"],
    ]
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for line in fresh:
        (extra,) = re.findall(r"-e '\.\[(\w+)\]'", line)
        assert re.search(rf'(EXTRAS\[)?"{extra}"\]?( =|:) (\[|sorted)', setup), extra
    for line in set(commands) - set(fresh):
        command, name, *arguments = shlex.split(line)
        assert command == "keras-effnet"
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(argument in text for argument in arguments if argument.startswith("--"))


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).is_file(), target


@pytest.mark.slow
def test_first_model(shared, tmp_path, monkeypatch, capsys):
    weights = shared("weights/efficientnetv2-b0.h5")
    (tmp_path / "panda.jpg").symlink_to(shared("data/panda.jpg"))
    monkeypatch.chdir(tmp_path)
    code = snippet("panda.jpg").replace('"imagenet"', repr(str(weights)))
    names = execute(code)
    assert names["probabilities"].argmax() == 388
    assert capsys.readouterr().out.splitlines()[-1].startswith("388 ")


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the export needs TensorFlow")
def test_transfer_learning(shared, tmp_path, monkeypatch):
    weights = shared("weights/efficientnetv2-b0.h5")
    # Few photographs of each class, so that the test takes minutes and not hours.
    for folder in sorted(shared("data/flowers/train").iterdir()):
        (tmp_path / "flowers" / folder.name).mkdir(parents=True)
        for photo in sorted(folder.iterdir())[:24]:
            (tmp_path / "flowers" / folder.name / photo.name).symlink_to(photo)
    monkeypatch.chdir(tmp_path)
    code = snippet("replace_head").replace('"imagenet"', repr(str(weights)))
    names = execute(code)

    model = names["model"]
    assert model.output_shape == (None, 5)
    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert not any(norm.trainable for norm in norms)
    assert not model.get_layer("block4a_expand_conv").trainable
    assert model.get_layer("block5a_expand_conv").trainable
    # So few photographs promise no accuracy, but it is measured, and training did not diverge.
    history = model.history.history
    assert len(history["val_accuracy"]) == 3
    assert all(loss < 10 for loss in history["loss"])
