"""Converters refuse what they cannot convert: one error, nothing half-loaded, nothing written."""

import os
import pickle
import sys
import tarfile
from dataclasses import replace

import keras
import numpy as np
import pytest
from reference_networks import write_checkpoint

from keras_effnet import convert_weights, read_checkpoint, read_spec, resolve
from keras_effnet.cli import main
from keras_effnet.conversion import convert, layouts
from keras_effnet.specs import SPECS
from keras_effnet.weights import SPEC_MEMBER, WeightsFileError, WeightsMismatchError

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.numpy").save_file
tf = pytest.importorskip("tensorflow")

# Six blocks of one kind: what is refused here is refused before anything is built.
SPEC = replace(SPECS["EfficientNetB0"], width=0.25, depth=0.1, resolution=32)


def values(layout="timm", classes=3, spec=SPEC):
    rng = np.random.default_rng(0)
    rows = layouts.tensors(resolve(spec, classes=classes), layouts.BY_NAME[layout])
    return {row.source: rng.uniform(0.5, 1, row.shape).astype("float32") for row in rows}


def tensors(state):
    return {name: torch.from_numpy(value) for name, value in state.items()}


@pytest.fixture
def timm(tmp_path):
    path = tmp_path / "efficientnet_b0.safetensors"
    save_file(values(), path)
    return path


def refused(path, error, message, tmp_path, **arguments):
    """Both functions refuse alike, and nothing is written."""
    before = sorted(tmp_path.iterdir())
    for call in (read_checkpoint, lambda p, **a: convert_weights(p, tmp_path / "out.keras", **a)):
        with pytest.raises(error, match=message):
            call(path, **arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_one_error_lists_all_that_does_not_fit(tmp_path):
    state = values()
    del state["conv_head.weight"], state["bn2.bias"]
    state["aux.weight"] = np.zeros(3, "float32")
    state["blocks.1.0.conv_pw.weight"] = np.zeros((5, 8, 1, 1), "float32")
    state["bn1.weight"] = state["bn1.weight"].astype("int32")
    path = tmp_path / "efficientnet_b0.safetensors"
    save_file(state, path)
    refused(
        path,
        WeightsMismatchError,
        r"nothing was loaded.\nMissing in the file \(2\): conv_head.weight, bn2.bias\n"
        r"Unexpected, not of this variant \(1\): aux.weight\n"
        r"Misshapen \(1\): blocks.1.0.conv_pw.weight \(variant \(48, 8, 1, 1\), "
        r"file \(5, 8, 1, 1\)\)\nNot of a type among .*\(1\): bn1.weight \(int32\)",
        tmp_path,
        model=SPEC,
    )


def test_another_variant_than_the_file_has(timm, tmp_path):
    message = "not those of EfficientNetB0; nothing was loaded"
    refused(timm, WeightsMismatchError, message, tmp_path, model="EfficientNetB0")
    # Without a name, the closest variant is compared.
    refused(timm, WeightsMismatchError, "not those of EfficientNet.*closest variant", tmp_path)


def test_every_name_of_the_table_is_needed(tmp_path):
    """Whatever is left out is named, for every layout."""
    for layout in layouts.BY_NAME:
        state = values(layout)
        shapes = {name: value.shape for name, value in state.items()}
        for left_out in list(shapes)[1::7]:
            others = {name: shape for name, shape in shapes.items() if name != left_out}
            source = convert.Checkpoint(
                "x", "pytorch", others, dict.fromkeys(others, "float32"), lambda name: None
            )
            if layouts.BY_NAME[layout].marker not in others:
                continue
            names = {name: name for name in others}
            with pytest.raises(WeightsMismatchError, match=f": {left_out.replace('.', '[.]')}"):
                convert._match(source, names, layouts.BY_NAME[layout], SPEC)


def test_values_that_are_no_numbers(tmp_path):
    state = values()
    state["bn1.running_var"][3] = np.nan
    state["classifier.weight"][0, 0] = np.inf
    path = tmp_path / "efficientnet_b0.safetensors"
    save_file(state, path)
    message = r"Not finite \(2\): bn1.running_var, classifier.weight"
    refused(path, WeightsMismatchError, message, tmp_path, model=SPEC)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(form, tmp_path):
    path, trap = tmp_path / "efficientnet_b0.pth", tmp_path / "trap"
    loaded = {**tensors(values()), "code": Code(trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(loaded))
    else:
        torch.save(loaded, path, _use_new_zipfile_serialization=form == "zip")
    refused(path, WeightsFileError, "refused: its pickle holds more.*state_dict", tmp_path)
    assert not trap.exists()


def test_a_whole_model_of_pytorch_is_refused(tmp_path):
    path = tmp_path / "efficientnet_b0.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    refused(path, WeightsFileError, "refused: its pickle holds more than tensors", tmp_path)
    torch.save({"epoch": 3, "optimizer": {}}, path)
    refused(path, WeightsFileError, "holds no state dict.*'epoch', 'optimizer'", tmp_path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "tar", "data", "keras"])
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_half_a_download(form, share, tmp_path):
    path = tmp_path / "efficientnet_b0.bin"
    if form in ("zip", "legacy"):
        torch.save(tensors(values()), path, _use_new_zipfile_serialization=form == "zip")
    elif form == "safetensors":
        save_file(values(), path)
    elif form == "keras":
        inputs = keras.Input((4,))
        path = tmp_path / "model.keras"
        keras.Model(inputs, keras.layers.Dense(50)(inputs)).save(path)
    else:
        prefix = write_checkpoint(tmp_path / "model.ckpt", values("tensorflow"))
        if form == "data":
            path = prefix.with_name("model.ckpt.data-00000-of-00001")
        else:
            with tarfile.open(path, "w:gz") as archive:
                for file in tmp_path.glob("model.ckpt*"):
                    archive.add(file, file.name)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    arguments = {} if form == "keras" else {"model": SPEC, "ema": False}
    message = "(damaged or incomplete|a weights file|holds no)"
    refused(path, (WeightsFileError,), message, tmp_path, **arguments)


def test_a_checkpoint_without_its_data(tmp_path):
    prefix = write_checkpoint(tmp_path / "model.ckpt", values("tensorflow"))
    prefix.with_name("model.ckpt.data-00000-of-00001").unlink()
    refused(prefix, WeightsFileError, "damaged or incomplete", tmp_path, model=SPEC, ema=False)


def test_folders_and_other_files(tmp_path):
    refused(tmp_path / "no.pth", FileNotFoundError, "no file, folder or TensorFlow", tmp_path)
    refused(tmp_path, WeightsFileError, "holds no TensorFlow checkpoints", tmp_path)
    for name in "ab":
        write_checkpoint(tmp_path / f"{name}.ckpt", {"x": np.zeros(2, "float32")})
    refused(tmp_path, WeightsFileError, "holds 2 TensorFlow checkpoints: a.ckpt, b.ckpt", tmp_path)
    text = tmp_path / "readme.txt"
    text.write_text("weights")
    refused(text, WeightsFileError, "no weights file that can be converted", tmp_path)
    other = tmp_path / "resnet.safetensors"
    save_file({"conv1.weight": np.zeros(3, "float32")}, other)
    refused(other, WeightsFileError, "names of none of the layouts.*such as .'conv1", tmp_path)


def test_object_based_checkpoints_are_explained(tmp_path):
    path = tf.train.Checkpoint(stem=tf.Variable([1.0])).write(str(tmp_path / "object"))
    refused(path, WeightsFileError, "object-based TensorFlow checkpoint", tmp_path)


def test_layouts_are_told_apart_or_asked_for(timm, tmp_path):
    refused(timm, ValueError, "`layout` must be None or one of", tmp_path, layout="jax")
    message = "does not have the names of layout='lukemelas'.*like 'timm' or 'timm-tf'"
    refused(timm, WeightsMismatchError, message, tmp_path, layout="lukemelas")
    refused(timm, ValueError, "file of format 'safetensors'", tmp_path, layout="keras")
    plain = timm.rename(tmp_path / "weights.safetensors")
    message = "nothing tells whether.*layout='timm-tf' or layout='timm'"
    refused(plain, ValueError, message, tmp_path, model=SPEC)
    found = read_checkpoint(plain, model=SPEC, layout="timm-tf")
    assert found.layout == "timm-tf" and found.spec.padding == "explicit"
    (tmp_path / "config.json").write_text('{"architecture": "tf_efficientnet_b0"}')
    assert read_checkpoint(plain, model=SPEC).layout == "timm-tf"
    fused = replace(SPECS["EfficientNetV2B0"], width=0.25, depth=0.1)
    path = tmp_path / "fused.safetensors"
    save_file({**values("lukemelas")}, path)
    refused(path, WeightsMismatchError, "has no EfficientNetV2B0", tmp_path, model=fused)


def test_preprocessing_is_one_of_those_known(timm, tmp_path):
    message = "`preprocessing` must be None, one of .'imagenet', 'advprop'"
    refused(timm, ValueError, message, tmp_path, preprocessing="caffe", model=SPEC)


def test_keras_files_without_names_need_the_variant(tmp_path):
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3, name="stem_conv")(inputs)
    keras.Model(inputs, x).save(tmp_path / "other.keras")
    refused(tmp_path / "other.keras", ValueError, "does not tell its variant", tmp_path)


@pytest.mark.parametrize("library, form", [("torch", ".pth"), ("safetensors", ".safetensors")])
def test_a_missing_library_is_named(library, form, tmp_path, monkeypatch):
    path = tmp_path / f"efficientnet_b0{form}"
    if form == ".pth":
        torch.save(tensors(values()), path)
    else:
        save_file(values(), path)
    monkeypatch.setitem(sys.modules, library, None)
    refused(path, ImportError, f"`{library}` is needed.*pip install", tmp_path, model=SPEC)


def test_the_output_is_checked_before_anything_is_read(timm, tmp_path):
    with pytest.raises(ValueError, match="must end in '.keras'"):
        convert_weights(timm, tmp_path / "out.h5")
    with pytest.raises(FileNotFoundError, match="no folder"):
        convert_weights(timm, tmp_path / "nowhere" / "out.keras")
    (tmp_path / "out.keras").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        convert_weights(timm, tmp_path / "out.keras", model=SPEC)
    assert (tmp_path / "out.keras").read_bytes() == b"mine"


@pytest.mark.parametrize("moment", ["save", "replace"])
def test_a_file_is_written_whole_or_not_at_all(moment, timm, tmp_path, monkeypatch):
    target = tmp_path / "out.keras"
    target.write_bytes(b"mine")

    def full(*arguments, **_):
        raise OSError(28, "No space left on device")

    if moment == "save":
        monkeypatch.setattr(keras.Model, "save", full)
    else:
        monkeypatch.setattr(convert.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        convert_weights(timm, target, model=SPEC, overwrite=True)
    assert target.read_bytes() == b"mine"
    assert {file.name for file in tmp_path.iterdir()} == {timm.name, target.name}


def test_a_spec_that_cannot_be_read(tmp_path, timm):
    import zipfile

    target = tmp_path / "out.keras"
    convert_weights(timm, target, model=SPEC)
    assert read_spec(target).constructor == "EfficientNetB0"
    with zipfile.ZipFile(tmp_path / "bad.keras", "w") as archive:
        archive.writestr(SPEC_MEMBER, "{}")
    with pytest.raises(WeightsFileError, match="cannot be read"):
        read_spec(tmp_path / "bad.keras")
    assert read_spec(timm) is None
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_spec(tmp_path / "nothing.keras")


# --- The command ------------------------------------------------------------------------------


def run(capsys, *argv):
    try:
        code = main(["convert-weights", *map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_converts_and_tells(capsys, tmp_path):
    spec = SPECS["EfficientNetTiny"]
    path, target = tmp_path / "tf_efficientnet_tiny.safetensors", tmp_path / "tiny.keras"
    save_file(values(classes=5, spec=spec), path)
    code, out, err = run(capsys, "--weights", path, "--output", target)
    assert code == 0 and f"Written: {target}" in err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["variant"] == "EfficientNetTiny, 5 classes"
    assert lines["layout"] == "timm-tf" and lines["padding"] == "explicit"
    assert keras.models.load_model(target).output_shape == (None, 5)
    code, out, err = run(capsys, "--weights", path, "--output", target)
    assert code == 2 and out == "" and "--overwrite" in err


@pytest.mark.parametrize(
    "argv, code, message",
    [
        ([], 2, "one of the arguments --weights --list is required"),
        (["--weights", "x.pth"], 2, "--output is missing"),
        (["--weights", "x.pth", "--output", "x.h5"], 2, "--output is a .keras file"),
        (["--weights", "x.pth", "--output", "x.keras", "--layout", "jax"], 2, "--layout must be"),
        (["--weights", "x", "--output", "x.keras", "--model", "B9"], 2, "Unknown model 'B9'"),
        (["--weights", "x.pth", "--output", "x.keras"], 1, "There is no file"),
        (["--list", "resnet*"], 2, "No official file"),
    ],
)
def test_wrong_usage(argv, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *argv)
    assert (found, out) == (code, "") and message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_official_files(capsys):
    code, out, _ = run(capsys, "--list", "*lite0")
    assert code == 0
    assert "75.1" in out and "checkpoint" in out and "lite/efficientnet-lite0.tar.gz" in out
