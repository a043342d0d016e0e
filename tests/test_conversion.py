"""Converters: what a checkpoint of another project computes, ours computes after conversion.

The references are other projects' networks, rebuilt from their code in `reference_networks.py`.
"""

import dataclasses
import json
import math
import tarfile
from dataclasses import dataclass, replace

import keras
import numpy as np
import pytest
import reference_networks as reference

import keras_effnet
from keras_effnet import build, convert_weights, create_model, read_checkpoint, read_spec, resolve
from keras_effnet import weights as weights_module
from keras_effnet.conversion import convert, fetch_converted, layouts
from keras_effnet.specs import ADVPROP, SPECS, ModelSpec, PreprocessingSpec
from keras_effnet.weights import WeightsMismatchError

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("tensorflow")

# The bar of the converters. Probabilities in float32, of the same network in another library.
TOLERANCE = 1e-4
# Weights of 8 bits, through 25 layers.
BFLOAT16_TOLERANCE = 0.15

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TRANSFORMS = {
    "imagenet": lambda x: (x / 255 - MEAN) / STD,
    "inception": lambda x: x / 127.5 - 1,
    "centered": lambda x: (x - 127) / 128,
    "v2": lambda x: (x - 128) / 128,
}


@dataclass(frozen=True)
class Case:
    """A network of a project, and the variant of ours that it is.

    Args:
        layout: Name of ours.
        variant: Name of ours.
        table: Blocks, in `reference_networks`.
        transform: What the project does to pixels.
        width: Of the variant, official.
        depth: Of the variant, official.
        scope: TensorFlow's.
        network: Further arguments of `reference_networks.run`.
    """

    layout: str
    variant: str
    table: str
    transform: str
    width: float = 1.0
    depth: float = 1.0
    scope: str = ""
    network: dict = dataclasses.field(default_factory=dict)


V2 = {"floor": 0}
LITE = {"activation": "relu6", "fixed_ends": True}
EDGE = {"activation": "relu", "strided_projections": True, "skipless": (0,)}
CASES = (
    Case("tensorflow", "EfficientNetB0", reference.V1, "imagenet", scope="efficientnet-b0"),
    Case(
        "tensorflow",
        "EfficientNetLite2",
        reference.LITE,
        "centered",
        1.1,
        1.2,
        "efficientnet-lite2",
        LITE,
    ),
    Case(
        "tensorflow",
        "EfficientNetEdgeTPUM",
        reference.EDGETPU,
        "centered",
        1.0,
        1.1,
        "efficientnet-edgetpu-M",
        EDGE,
    ),
    Case(
        "tensorflow",
        "EfficientNetV2B1",
        reference.V2_BASE,
        "imagenet",
        1.0,
        1.1,
        "efficientnetv2-b1",
        V2,
    ),
    Case(
        "tensorflow",
        "EfficientNetV2S",
        reference.V2_S,
        "v2",
        scope="efficientnetv2-s",
        network={**V2, "stem": 24},
    ),
    Case("timm", "EfficientNetB1", reference.V1, "imagenet", 1.0, 1.1),
    Case(
        "timm",
        "EfficientNetEdgeTPUS",
        reference.EDGETPU,
        "imagenet",
        network={"activation": "relu", "skipless": (0,)},
    ),
    Case("timm-tf", "EfficientNetB0", reference.V1, "imagenet"),
    Case("timm-tf", "EfficientNetLite0", reference.LITE, "inception", network=LITE),
    Case("timm-tf", "EfficientNetEdgeTPUS", reference.EDGETPU, "inception", network=EDGE),
    Case("timm-tf", "EfficientNetV2B0", reference.V2_BASE, "imagenet", network=V2),
    Case("timm-tf", "EfficientNetV2S", reference.V2_S, "inception", network={**V2, "stem": 24}),
    Case("torchvision", "EfficientNetB0", reference.V1, "imagenet"),
    Case("torchvision", "EfficientNetV2S", reference.V2_S, "imagenet", network={**V2, "stem": 24}),
    Case("lukemelas", "EfficientNetB2", reference.V1, "imagenet", 1.1, 1.2),
)
IDS = [f"{case.layout}-{case.variant}" for case in CASES]
# Narrow and shallow networks of the same stages, with which a test takes a second.
THIN = {"width": 0.25, "depth": 0.4}
SIDE = 50  # 25 behind the stem, 13 behind the next stride: even and odd sides are padded.


def thin(variant):
    # torchvision's sizes and epsilons go by the variant, so that its name stays.
    return replace(SPECS[variant], resolution=SIDE, **THIN)


def pixels(side):
    """Two images of coarse coloured patches: of noise alone, all images have the same features."""
    rng = np.random.default_rng(5)
    patches = rng.uniform(0, 255, (2, 5, 5, 3))
    places = np.arange(side) * 5 // side
    x = patches[:, places][:, :, places] + rng.normal(0, 20, (2, side, side, 3))
    return x.clip(0, 255).astype("float32")


def names_of(case):
    stages = len(case.table.strip().splitlines())
    return {
        "tensorflow": lambda: reference.TensorFlowNames(case.scope),
        "timm": reference.TimmNames,
        "timm-tf": reference.TimmNames,
        "torchvision": lambda: reference.TorchvisionNames(stages),
        "lukemelas": reference.LukemelasNames,
    }[case.layout]()


def epsilon_of(case):
    if case.layout == "timm" or (case.layout == "torchvision" and "V2" not in case.variant):
        return 1e-5
    return 1e-3


def made(case, side, width, depth, classes=7, seed=0):
    """Tensors of a checkpoint, and the probabilities that belong to `pixels(side)`."""
    tensors = reference.Tensors(seed)
    if case.layout == "tensorflow":
        ops = reference.TensorFlow(tensors)
    else:
        same = case.layout in ("timm-tf", "lukemelas")
        ops = reference.Torch(tensors, epsilon_of(case), same)
    x = TRANSFORMS[case.transform](pixels(side)).astype("float32")
    output = reference.run(
        ops,
        names_of(case),
        case.table,
        x,
        classes=classes,
        width=width,
        depth=depth,
        **case.network,
    )
    return tensors.values, output


def write_trained(prefix, values, averaged=True):
    """A checkpoint of TensorFlow 1 with what training leaves beside the weights."""
    stored = {"global_step": np.array(1000, "int64")}
    for name, value in values.items():
        if averaged:
            stored[f"{name}/ExponentialMovingAverage"] = value
            stored[name] = value + np.float32(1)  # Of the last step: not these.
            stored[f"{name}/RMSProp"] = np.ones_like(value)
        else:
            stored[name] = value
    return reference.write_checkpoint(prefix, stored)


def write(case, values, folder):
    """The file of a project, under a name that it would have there."""
    if case.layout == "tensorflow":
        return write_trained(folder / "model.ckpt", values)
    if case.layout.startswith("timm"):
        from safetensors.numpy import save_file

        prefix = "tf_" if case.layout == "timm-tf" else ""
        path = folder / f"{prefix}efficientnet_x.safetensors"
        save_file(values, path)
        return path
    path = folder / "weights.pth"
    torch.save({name: torch.from_numpy(value) for name, value in values.items()}, path)
    return path


def probabilities(model, side):
    return keras.ops.convert_to_numpy(model(pixels(side), training=False))


# --- The bar ----------------------------------------------------------------------------------


# One of each layout and each kind of block; the others take the slow tests.
FAST = (
    "tensorflow-EfficientNetB0",
    "tensorflow-EfficientNetEdgeTPUM",
    "timm-EfficientNetB1",
    "timm-tf-EfficientNetLite0",
    "torchvision-EfficientNetV2S",
    "lukemelas-EfficientNetB2",
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, case in zip(IDS, CASES, strict=True)
    ],
)
def test_a_thin_network_computes_what_the_project_computes(case, tmp_path):
    network = {"width": THIN["width"], "depth": THIN["depth"]}
    spec = thin(case.variant)
    side = 224 if case.layout == "torchvision" and "V2" not in case.variant else SIDE
    if case.layout == "torchvision" and "V2" in case.variant:
        spec = replace(spec, constructor="Thin")  # torchvision's 384 pixels take long.
        case = replace(case, variant="EfficientNetB0")
    values, expected = made(case, side, **network)
    path = write(case, values, tmp_path)
    assert expected.std() > 0.02, "equal probabilities would prove nothing"
    assert abs(expected[0] - expected[1]).max() > 0.02, "nor would those of any image"

    converted = read_checkpoint(path, model=spec)
    assert converted.layout == case.layout
    assert converted.classes == 7
    assert converted.spec.padding == (
        "torch" if case.layout in ("timm", "torchvision") else spec.padding
    )
    counted = [name for name in values if not name.endswith("num_batches_tracked")]
    assert converted.tensors == len(counted)
    found = probabilities(converted.model, side)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


# The others have the blocks and the names of these.
FULL = [name for name in IDS if name not in ("timm-tf-EfficientNetB0", "timm-tf-EfficientNetV2S")]


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[IDS.index(name)] for name in FULL], ids=FULL)
def test_a_full_network_is_recognised_and_computes_the_same(case, tmp_path):
    values, expected = made(case, 64, case.width, case.depth, classes=11)
    path = write(case, values, tmp_path)
    target = tmp_path / "out.keras"
    converted = convert_weights(path, target)
    assert converted.spec.constructor == case.variant
    # At another side than the variant's own: the same weights, less time.
    model = create_model(read_spec(target), weights=target, classes=11, input_shape=(64, 64, 3))
    np.testing.assert_allclose(probabilities(model, 64), expected, atol=TOLERANCE)
    keras.backend.clear_session()


def broken_padding(monkeypatch):
    layout = replace(layouts.BY_NAME["timm"], padding=None)
    monkeypatch.setitem(layouts.BY_NAME, "timm", layout)


def broken_epsilon(monkeypatch):
    monkeypatch.setattr(convert, "_fold_epsilon", lambda *arguments: None)


def broken_transform(monkeypatch):
    layout = replace(layouts.BY_NAME["timm"], adapt=lambda spec, config: _advprop(spec))
    monkeypatch.setitem(layouts.BY_NAME, "timm", layout)


def broken_names(monkeypatch):
    parameters = dict(layouts.BY_NAME["timm"].parameters)
    parameters["gamma"], parameters["moving_variance"] = ".running_var", ".weight"
    layout = replace(layouts.BY_NAME["timm"], parameters=parameters)
    monkeypatch.setitem(layouts.BY_NAME, "timm", layout)


def broken_transposition(monkeypatch):
    # Height and width of every kernel exchanged, which no shape tells.
    right = convert._arrays

    def wrong(*arguments):
        arrays = right(*arguments)
        for weights in arrays.values():
            if "kernel" in weights and weights["kernel"].ndim == 4:
                weights["kernel"] = weights["kernel"].transpose(1, 0, 2, 3)
        return arrays

    monkeypatch.setattr(convert, "_arrays", wrong)


def _advprop(spec):
    return replace(spec, preprocessing=replace(ADVPROP, stored_in_weights=True))


@pytest.mark.parametrize(
    "damage",
    [
        broken_padding,
        broken_epsilon,
        pytest.param(broken_transform, marks=pytest.mark.slow),
        pytest.param(broken_names, marks=pytest.mark.slow),
        pytest.param(broken_transposition, marks=pytest.mark.slow),
    ],
    ids=lambda damage: damage.__name__,
)
def test_the_comparison_sees_what_it_guards(damage, tmp_path, monkeypatch):
    case = CASES[IDS.index("timm-EfficientNetB1")]
    values, expected = made(case, SIDE, **THIN)
    path = write(case, values, tmp_path)
    damage(monkeypatch)
    found = probabilities(read_checkpoint(path, model=thin(case.variant)).model, SIDE)
    assert abs(found - expected).max() > 10 * TOLERANCE


@pytest.mark.slow
def test_the_padding_of_edgetpu_is_that_of_its_strided_projections(tmp_path):
    """The twin: with the padding of other stages the network is another."""
    case = CASES[IDS.index("timm-tf-EfficientNetEdgeTPUS")]
    values, expected = made(case, SIDE, **THIN)
    path = write(case, values, tmp_path)
    spec = thin(case.variant)
    stages = tuple(replace(stage, padding=None) for stage in spec.stages)
    # An even side, where TensorFlow's padding differs: 50, 25, then 13 (odd sides are equal).
    even = replace(spec, resolution=64, stages=stages)
    values, expected = made(case, 64, **THIN)
    path = write(case, values, tmp_path)
    right = read_checkpoint(path, model=replace(spec, resolution=64)).model
    np.testing.assert_allclose(probabilities(right, 64), expected, atol=TOLERANCE)
    wrong = read_checkpoint(path, model=even).model
    assert abs(probabilities(wrong, 64) - expected).max() > 10 * TOLERANCE


# --- What travels with the weights ------------------------------------------------------------


@pytest.fixture(scope="module")
def thin_timm(tmp_path_factory):
    """A file of a thin timm network, and its values."""
    case = CASES[IDS.index("timm-EfficientNetB1")]
    folder = tmp_path_factory.mktemp("thin")
    values, expected = made(case, SIDE, **THIN)
    return write(case, values, folder), values, expected


@pytest.fixture(scope="module")
def thin_tensorflow(tmp_path_factory):
    """A checkpoint of a thin V1, and its values."""
    case = CASES[0]
    folder = tmp_path_factory.mktemp("checkpoint")
    values, expected = made(case, SIDE, **THIN)
    return write(case, values, folder), values, expected


def test_the_written_file_is_complete(thin_timm, tmp_path):
    path, _, expected = thin_timm
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "efficientnet_b1",
                "pretrained_cfg": {
                    "mean": [0.4, 0.5, 0.6],
                    "std": [0.2, 0.25, 0.3],
                    "input_size": [3, 48, 48],
                    "crop_pct": 0.9,
                    "interpolation": "bilinear",
                },
            }
        )
    )
    source = tmp_path / "model.safetensors"
    source.write_bytes(path.read_bytes())
    target = tmp_path / "out.keras"
    conversion = convert_weights(source, target, model=thin("EfficientNetB1"))
    assert conversion.layout == "timm"
    spec = read_spec(target)
    assert spec == replace(conversion.spec, published=None)
    assert (spec.padding, spec.resolution) == ("torch", 48)
    assert spec.preprocessing == PreprocessingSpec(
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop_padding=5, interpolation="bilinear"
    )
    # Keras alone loads it, and it computes the same.
    loaded = keras.models.load_model(target)
    assert loaded.input_shape == (None, 48, 48, 3)
    outputs = probabilities(conversion.model, 48)
    np.testing.assert_array_equal(probabilities(loaded, 48), outputs)
    # So does a model built from its spec, whatever the head.
    rebuilt = create_model(spec, weights=target, classes=7)
    np.testing.assert_allclose(probabilities(rebuilt, 48), outputs, atol=1e-6)
    features = create_model(spec, weights=target, include_top=False, input_shape=(48, 48, 3))
    inner = keras.Model(loaded.input, loaded.get_layer("top_activation").output)
    np.testing.assert_allclose(probabilities(features, 48), probabilities(inner, 48), atol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "out.keras",
    ]


def test_a_graph_that_does_not_belong_to_the_weights_is_refused(thin_timm, tmp_path):
    path, _, _ = thin_timm
    target = tmp_path / "out.keras"
    convert_weights(path, target, model=thin("EfficientNetB1"))
    spec = replace(read_spec(target), padding="explicit")
    with pytest.raises(WeightsMismatchError, match="another graph.*padding.*read_spec"):
        create_model(spec, weights=target, classes=7)
    other = replace(read_spec(target), preprocessing=PreprocessingSpec(mean=None, std=None))
    with pytest.raises(WeightsMismatchError, match="preprocessing: the weights need"):
        create_model(other, weights=target, classes=7)
    # Without preprocessing layers it is the caller's affair.
    create_model(other, weights=target, classes=7, include_preprocessing=False)


def test_advprop_has_its_own_transform(thin_tensorflow):
    path, values, _ = thin_tensorflow
    converted = read_checkpoint(path, model=thin("EfficientNetB0"), preprocessing="advprop")
    assert converted.spec.preprocessing == ADVPROP
    x = pixels(SIDE)
    inner = keras.Model(converted.model.inputs, converted.model.get_layer("rescaling").output)
    np.testing.assert_allclose(inner.predict(x, verbose=0), x / 127.5 - 1, atol=1e-6)
    assert not any(layer.name == "normalization" for layer in converted.model.layers)
    custom = PreprocessingSpec(scale=1.0, mean=None, std=None, stored_in_weights=False)
    spec = read_checkpoint(path, model=thin("EfficientNetB0"), preprocessing=custom).spec
    assert spec.preprocessing == replace(custom, stored_in_weights=True)


@pytest.mark.parametrize("classes", [2, pytest.param(1001, marks=pytest.mark.slow)])
def test_heads_of_any_size(classes, tmp_path):
    case = CASES[0]
    values, expected = made(case, SIDE, classes=classes, **THIN)
    path = write_trained(tmp_path / "model.ckpt", values)
    converted = read_checkpoint(path, model=thin("EfficientNetB0"))
    assert converted.model.output_shape == (None, classes)
    np.testing.assert_allclose(probabilities(converted.model, SIDE), expected, atol=TOLERANCE)


def test_without_a_head(tmp_path):
    case = CASES[IDS.index("timm-EfficientNetB1")]
    values, _ = made(case, SIDE, **THIN)
    values = {name: value for name, value in values.items() if "classifier" not in name}
    converted = read_checkpoint(write(case, values, tmp_path), model=thin(case.variant))
    assert converted.classes is None
    assert converted.model.output_shape[:3] == (None, None, None)


# --- Where files come from --------------------------------------------------------------------


def test_a_checkpoint_is_found_by_prefix_file_folder_and_archive(thin_tensorflow, tmp_path):
    path, _, expected = thin_tensorflow
    with tarfile.open(tmp_path / "b0.tar.gz", "w:gz") as archive:
        for file in path.parent.glob("model.ckpt*"):
            archive.add(file, f"efficientnet-b0/{file.name}")
    index = path.with_name("model.ckpt.index")
    for source in (path, index, path.parent, tmp_path / "b0.tar.gz"):
        converted = read_checkpoint(source, model=thin("EfficientNetB0"))
        np.testing.assert_allclose(probabilities(converted.model, SIDE), expected, atol=TOLERANCE)


def test_a_name_fetches_converts_and_builds_once(thin_tensorflow, tmp_path, monkeypatch):
    path, _, _ = thin_tensorflow
    row = next(
        row for row in weights_module.list_weights("EfficientNetB0") if row.weights == "advprop"
    )
    archive = tmp_path / "mirror" / row.path
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as file:
        for part in path.parent.glob("model.ckpt*"):
            file.add(part, f"efficientnet-b0/{part.name}")
    home = tmp_path / "home"
    monkeypatch.setenv("KERAS_HOME", str(home))
    monkeypatch.setenv(weights_module.BASE_URL_VARIABLE, (tmp_path / "mirror").as_uri())
    monkeypatch.setitem(SPECS, "EfficientNetB0", thin("EfficientNetB0"))
    # A folder tells no hash; another test fetches with one.
    monkeypatch.setattr(weights_module, "_md5_told_by", lambda url: weights_module._md5(archive))
    expected = read_checkpoint(archive, model=thin("EfficientNetB0"), preprocessing="advprop")
    shape = (SIDE, SIDE, 3)
    options = {"weights": "advprop", "input_shape": shape, "classes": expected.classes}
    model = keras_effnet.EfficientNetB0(**options)
    wanted = probabilities(expected.model, SIDE)
    np.testing.assert_array_equal(probabilities(model, SIDE), wanted)
    usual = read_checkpoint(archive, model=thin("EfficientNetB0"))
    assert abs(probabilities(usual.model, SIDE) - wanted).max() > TOLERANCE
    # The archive is gone, the conversion stays, and serves without the network.
    (converted,) = (file for file in home.rglob("*") if file.is_file())
    assert converted == home / "models" / "efficientnetb0_advprop.keras"
    archive.unlink()
    again = keras_effnet.create_model("EfficientNetB0", include_top=False, **options)
    np.testing.assert_array_equal(
        again.get_layer("stem_conv").get_weights()[0],
        model.get_layer("stem_conv").get_weights()[0],
    )
    assert fetch_converted("EfficientNetB0", "advprop") == converted


def test_the_average_is_taken_unless_the_last_step_is_asked_for(thin_tensorflow, tmp_path):
    path, values, _ = thin_tensorflow
    name = "efficientnet-b0/stem/conv2d/kernel"
    converted = read_checkpoint(path, model=thin("EfficientNetB0"))
    kernel = converted.model.get_layer("stem_conv").get_weights()[0]
    np.testing.assert_array_equal(kernel, values[name])
    assert len(converted.ignored) == 2 * len(values) + 1
    last = read_checkpoint(path, model=thin("EfficientNetB0"), ema=False)
    np.testing.assert_array_equal(
        last.model.get_layer("stem_conv").get_weights()[0], values[name] + np.float32(1)
    )
    raw = write_trained(tmp_path / "raw.ckpt", values, averaged=False)
    with pytest.raises(WeightsMismatchError, match="moving average.*\nWithout one.*\n.*--no-ema"):
        read_checkpoint(raw, model=thin("EfficientNetB0"))
    read_checkpoint(raw, model=thin("EfficientNetB0"), ema=False)


@pytest.mark.parametrize(
    "wrap",
    [
        "module",
        "state_dict_ema",
        pytest.param("state_dict", marks=pytest.mark.slow),
        pytest.param("legacy", marks=pytest.mark.slow),
        pytest.param("bfloat16", marks=pytest.mark.slow),
    ],
)
def test_ways_to_save_in_pytorch(wrap, thin_timm, tmp_path):
    _, values, expected = thin_timm
    state = {name: torch.from_numpy(value) for name, value in values.items()}
    tolerance = TOLERANCE
    if wrap == "module":
        saved = {f"module.{name}": value for name, value in state.items()}
    elif wrap == "state_dict":
        saved = {"epoch": 3, "arch": "efficientnet_b1", "state_dict": state}
    elif wrap == "state_dict_ema":
        zeros = {name: torch.zeros_like(value) for name, value in state.items()}
        saved = {"state_dict": zeros, "state_dict_ema": state}
    elif wrap == "bfloat16":
        saved = {
            name: value.to(torch.bfloat16) if value.is_floating_point() else value
            for name, value in state.items()
        }
        tolerance = BFLOAT16_TOLERANCE
    else:
        saved = state
    path = tmp_path / "efficientnet_b1.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=wrap != "legacy")
    converted = read_checkpoint(path, model=thin("EfficientNetB1"))
    np.testing.assert_allclose(probabilities(converted.model, SIDE), expected, atol=tolerance)


@pytest.mark.slow
def test_half_precision_in_safetensors(thin_timm, tmp_path):
    from safetensors.torch import save_file

    _, values, expected = thin_timm
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, BFLOAT16_TOLERANCE)):
        path = tmp_path / f"efficientnet_{dtype}.safetensors"
        state = {
            name: torch.from_numpy(value).to(dtype)
            if value.dtype == "float32"
            else torch.from_numpy(value)
            for name, value in values.items()
        }
        save_file(state, path)
        converted = read_checkpoint(path, model=thin("EfficientNetB1"))
        np.testing.assert_allclose(probabilities(converted.model, SIDE), expected, atol=tolerance)
        kernel = state["conv_stem.weight"].float().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(
            converted.model.get_layer("stem_conv").get_weights()[0], kernel
        )


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(".h5", marks=pytest.mark.slow),
        pytest.param(".weights.h5", marks=pytest.mark.slow),
        ".keras",
    ],
)
def test_files_of_keras_go_the_same_way(form, tmp_path):
    source = create_model("EfficientNetTiny", weights=None, classes=4)
    path = tmp_path / f"tiny{form}"
    if form == ".weights.h5":
        source.save_weights(path)
    else:
        source.save(path)
    converted = convert_weights(path, tmp_path / "out.keras")
    assert (converted.spec, converted.layout) == (SPECS["EfficientNetTiny"], "keras")
    assert converted.classes == 4
    loaded = keras.models.load_model(tmp_path / "out.keras")
    np.testing.assert_array_equal(probabilities(loaded, 32), probabilities(source, 32))
    # What was converted can be converted again.
    again = convert_weights(tmp_path / "out.keras", tmp_path / "again.keras")
    assert again.spec == replace(SPECS["EfficientNetTiny"], published=None)


def test_other_numbers_of_input_channels(tmp_path):
    case = CASES[IDS.index("timm-EfficientNetB1")]
    values, _ = made(case, SIDE, **THIN)
    values["conv_stem.weight"] = values["conv_stem.weight"][:, :1].copy()
    converted = read_checkpoint(write(case, values, tmp_path), model=thin(case.variant))
    assert converted.model.input_shape == (None, SIDE, SIDE, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, padding",
    [
        *((variant, None) for variant in SPECS),
        ("EfficientNetB0", "torch"),
        ("EfficientNetV2B0", "torch"),
        ("EfficientNetEdgeTPUS", "torch"),
    ],
)
def test_every_variant_survives_every_format(variant, padding, tmp_path):
    """`.keras` by Keras and by us, and `.weights.h5`: narrow networks of the same stages."""
    spec = replace(SPECS[variant], width=0.25, depth=0.1, resolution=36)
    spec = spec if padding is None else replace(spec, padding=padding)
    keras.utils.set_random_seed(0)
    model = build(spec, classes=3)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            rng = np.random.default_rng(len(layer.name))
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    expected = probabilities(model, 36)
    convert.write_model(model, spec, tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    assert read_spec(tmp_path / "model.keras") == replace(spec, published=None)
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        create_model(
            read_spec(tmp_path / "model.keras"), weights=tmp_path / "model.keras", classes=3
        ),
        create_model(spec, weights=tmp_path / "model.weights.h5", classes=3),
        read_checkpoint(tmp_path / "model.keras").model,
    ):
        for own, other in zip(loaded.weights, model.weights, strict=True):
            np.testing.assert_array_equal(
                keras.ops.convert_to_numpy(own), keras.ops.convert_to_numpy(other)
            )
        np.testing.assert_allclose(probabilities(loaded, 36), expected, atol=1e-6)
    keras.backend.clear_session()


# --- Recognition, without any file ------------------------------------------------------------


def rows_of(variant, layout, **sizes):
    return layouts.tensors(resolve(variant, **sizes), layouts.BY_NAME[layout])


@pytest.mark.parametrize("layout", layouts.BY_NAME)
def test_every_variant_has_its_own_names_and_shapes(layout):
    owners = {}
    for variant, spec in SPECS.items():
        rows = rows_of(variant, layout)
        if layout == "lukemelas" and any(s.block == "fused_mbconv" for s in spec.stages):
            assert rows is None
            continue
        sources = [row.source for row in rows]
        assert len(sources) == len(set(sources)), "no tensor of the file stands for two"
        targets = [(row.layer, row.variable) for row in rows]
        assert len(targets) == len(set(targets))
        plan = resolve(variant, include_preprocessing=False)
        assert sum(math.prod(row.shape) for row in rows) == plan.parameters
        owners.setdefault(frozenset((row.source, row.shape) for row in rows), []).append(variant)
    assert all(len(variants) == 1 for variants in owners.values())


@pytest.mark.parametrize("variant", ["EfficientNetB5", "EfficientNetLite2", "EfficientNetV2B2"])
def test_a_variant_is_found_by_its_shapes(variant):
    rows = rows_of(variant, "timm")
    checkpoint = convert.Checkpoint(
        "x",
        "pytorch",
        {row.source: row.shape for row in rows},
        {row.source: "float32" for row in rows},
        lambda name: None,
    )
    names = {row.source: row.source for row in rows}
    found, *_ = convert._match(checkpoint, names, layouts.BY_NAME["timm"], None)
    assert found.constructor == variant


def test_specs_that_torchvision_and_timm_give():
    def adapted(layout, variant, config=None):
        return layouts.BY_NAME[layout].adapt(SPECS[variant], config or {})

    b3 = adapted("torchvision", "EfficientNetB3")
    assert (b3.resolution, b3.preprocessing.crop_padding) == (300, 20)
    v2l = adapted("torchvision", "EfficientNetV2L").preprocessing
    assert (v2l.scale, v2l.offset, v2l.mean) == (1 / 127.5, -1.0, None)
    assert adapted("torchvision", "EfficientNetV2S").preprocessing.interpolation == "bilinear"
    # timm's own Lite0 was trained with ImageNet's statistics, its port with Inception's.
    assert adapted("timm", "EfficientNetLite0").preprocessing.mean == (0.485, 0.456, 0.406)
    port = adapted("timm-tf", "EfficientNetLite0").preprocessing
    assert (port.scale, port.offset) == (1 / 127.5, -1.0)
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 288, 288], "crop_pct": 1.0}
    b0 = adapted("timm", "EfficientNetB0", config)
    assert (b0.resolution, b0.preprocessing.crop_padding) == (288, 0)
    assert (b0.preprocessing.scale, b0.preprocessing.mean) == (1 / 127.5, None)
    # Epsilons: torchvision's ports of B5 to B7 keep TensorFlow's.
    epsilon = layouts.BY_NAME["torchvision"].bn_epsilon
    assert epsilon("EfficientNetB4") == 1e-5
    assert epsilon("EfficientNetB5") == epsilon("EfficientNetV2S") == 1e-3


def test_the_average_of_a_variant_and_its_spec_are_plain_values(thin_tensorflow):
    path, _, _ = thin_tensorflow
    converted = read_checkpoint(path, model=thin("EfficientNetB0"))
    assert isinstance(converted.spec, ModelSpec)
    assert ModelSpec.from_dict(json.loads(json.dumps(converted.spec.to_dict()))) == replace(
        converted.spec, published=None
    )
