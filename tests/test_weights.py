"""Weights: sources, verified download, reading every layout, loading by name."""

import base64
import hashlib
import http.server
import io
import os
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import keras_effnet
from keras_effnet import scaling, specs, weights

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Float32 rounding of one multiplication more, relative to the largest output.
REORDERED = 1e-5
MEAN = np.array(specs.IMAGENET_MEAN, "float32")
STD = np.array(specs.IMAGENET_STD, "float32")


# --- A network of a few layers that has everything the rules are about -------------------------


def network(
    channels=3,
    classes=4,
    filters=8,
    preprocessing="weights",
    second_rescaling=False,
    name="network",
    seed=0,
):
    """Layers and names of keras.applications' V1, one block of them, with random weights."""
    x = inputs = keras.Input((8, 8, channels))
    if preprocessing is not None:
        constants = {"mean": [0.4] * channels, "variance": [0.05] * channels}
        x = keras.layers.Rescaling(1 / 255, name="rescaling")(x)
        x = keras.layers.Normalization(
            name="normalization", **(constants if preprocessing == "constants" else {})
        )(x)
    if second_rescaling:
        factors = [float(1 / np.sqrt(std)) for std in STD]
        x = keras.layers.Rescaling(factors, name="second_rescaling")(x)
    x = keras.layers.Conv2D(filters, 3, 2, use_bias=False, name="stem_conv")(x)
    x = keras.layers.BatchNormalization(name="stem_bn")(x)
    x = keras.layers.DepthwiseConv2D(3, use_bias=False, name="block1a_dwconv")(x)
    x = keras.layers.BatchNormalization(name="block1a_bn")(x)
    x = keras.layers.Conv2D(6, 1, name="top_conv")(x)
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if classes:
        x = keras.layers.Dense(classes, name="predictions")(x)
    model = keras.Model(inputs, x, name=name)
    randomize(model, seed)
    return model


def randomize(model, seed, normalization=True):
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            if layer.weights and normalization:
                set_normalization(layer, rng.uniform(0.3, 0.6, 3))
            continue
        for variable in layer.weights:
            scale = np.sqrt(2 / max(1, np.prod(variable.shape[:-1])))
            value = rng.normal(1 if variable.name == "gamma" else 0, scale, variable.shape)
            variable.assign(np.abs(value) if variable.name == "moving_variance" else value)


def set_normalization(layer, mean, variance=None):
    channels = layer.weights[0].shape[0]
    layer.weights[0].assign(np.resize(mean, channels))
    layer.weights[1].assign(np.resize(STD**2 if variance is None else variance, channels))
    layer.finalize_state()


def arrays(model):
    """Every weight by layer and variable name."""
    return {
        f"{layer.name}/{variable.name}": keras.ops.convert_to_numpy(variable)
        for layer in model.layers
        for variable in layer.weights
    }


def assert_same(model, reference, skip=()):
    mine, theirs = arrays(model), arrays(reference)
    names = [name for name in mine if name.split("/")[0] not in skip]
    assert names
    for name in names:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def outputs(model, channels=3, side=8):
    images = np.random.default_rng(9).uniform(0, 255, (2, side, side, channels))
    return keras.ops.convert_to_numpy(model(images.astype("float32"), training=False))


def write_legacy(path, model, rename=lambda layer: layer, root="", chunked=False):
    """The layout of the official files, as TensorFlow's Keras 2 wrote them."""
    with h5py.File(path, "w") as file:
        group = file.create_group(root) if root else file
        names = [rename(layer.name).encode() for layer in model.layers]
        if chunked:  # What Keras does when an attribute would exceed 64 KiB.
            for index, part in enumerate(np.array_split(np.array(names), 2)):
                group.attrs[f"layer_names{index}"] = part
        else:
            group.attrs["layer_names"] = names
        for layer in model.layers:
            layer_group = group.create_group(rename(layer.name))
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            paths = []
            for variable in layer.weights:
                name = "depthwise_kernel" if depthwise else variable.name
                paths.append(f"{rename(layer.name)}/{name}:0")
                layer_group[paths[-1]] = keras.ops.convert_to_numpy(variable)
            layer_group.attrs["weight_names"] = [path.encode() for path in paths]
    return path


def without_names(path):
    """Turns a `.weights.h5` into one of Keras before 3.8 or so, which had counters alone."""

    def strip(_, item):
        item.attrs.pop("name", None)

    with h5py.File(path, "r+") as file:
        file.visititems(strip)
    return path


# --- Sources ----------------------------------------------------------------------------------


def test_sources_hold_the_files_and_hashes_of_keras_applications():
    for module, prefix, folder in (
        ("efficientnet", "EfficientNet", "keras-applications/"),
        ("efficientnet_v2", "EfficientNetV2", "tensorflow/keras-applications/efficientnet_v2/"),
    ):
        official = sys.modules[f"keras.src.applications.{module}"]
        assert official.BASE_WEIGHTS_PATH == f"{weights.BASE_URL}/{folder}"
        for suffix, hashes in official.WEIGHTS_HASHES.items():
            model = prefix + suffix.removeprefix("-").upper()
            found = [source for source in weights.list_weights(model) if source.md5]
            assert [source.include_top for source in found] == [True, False]
            assert tuple(source.md5 for source in found) == hashes
            name = specs.get_spec(model).name
            assert [source.path for source in found] == [
                f"{folder}{name}.h5",
                f"{folder}{name}_notop.h5",
            ]
    assert len([source for source in weights.SOURCES if source.md5]) == 2 * 15


def test_checkpoints_of_the_authors_are_listed_with_their_accuracy():
    found = {source.weights: source for source in weights.list_weights("EfficientNetB0")}
    assert list(found) == ["imagenet", "baseline", "autoaugment", "advprop", "noisy-student"]
    assert found["noisy-student"].url == (
        "https://storage.googleapis.com/cloud-tpu-checkpoints/efficientnet/noisystudent/"
        "noisy_student_efficientnet-b0.tar.gz"
    )
    assert (found["advprop"].top1, found["advprop"].preprocessing) == (77.6, "advprop")
    assert found["baseline"].preprocessing is None
    files = {(s.model, s.weights): s.path.rpartition("efficientnet/")[2] for s in weights.SOURCES}
    assert files["EfficientNetLite4", "imagenet"] == "lite/efficientnet-lite4.tar.gz"
    assert files["EfficientNetEdgeTPUL", "imagenet"] == "efficientnet-edgetpu-L.tar.gz"
    assert files["EfficientNetV2XL", "imagenet21k-ft1k"] == "v2/efficientnetv2-xl-21k-ft1k.tgz"
    assert files["EfficientNetL2", "noisy-student-475"].endswith("efficientnet-l2_475.tar.gz")
    # Every variant but ours has something, and what has no hash has no row of its own twice.
    assert {source.model for source in weights.SOURCES} == set(specs.SPECS) - {"EfficientNetTiny"}
    keys = [(s.model, s.weights, s.include_top) for s in weights.SOURCES]
    assert len(keys) == len(set(keys))


def test_list_weights_matches_patterns_regardless_of_case():
    assert {s.model for s in weights.list_weights("*v2b?")} == {
        f"EfficientNetV2B{i}" for i in range(4)
    }
    assert weights.list_weights("resnet*") == []


@pytest.mark.parametrize(
    "change, message",
    [({"model": "ResNet50"}, "variant of the table"), ({"md5": "abc"}, "32 hexadecimal")],
)
def test_a_source_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        replace(weights.SOURCES[0], **change)


# --- Fetching ---------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path to bytes) on loopback and records what was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.cut = {}, [], 0
        # By path: the headers that Google's storage tells hashes in.
        self.hashes = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}/mirror"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for value in self.server.hashes.get(self.path, ()):
            self.send_header("x-goog-hash", value)
        self.end_headers()
        return body

    def do_GET(self):
        self.server.requests.append(self.path)
        body = self.do_HEAD()
        if body is not None:
            self.wfile.write(body[: len(body) - self.server.cut])

    def log_message(self, *_):
        pass


BODY = b"weights" * 100
PATH = "/mirror/keras-applications/efficientnetb0.h5"


@pytest.fixture
def server(monkeypatch):
    """A mirror that has B0's file, of which the table holds the hash."""
    row = replace(weights.list_weights("EfficientNetB0")[0], md5=hashlib.md5(BODY).hexdigest())
    monkeypatch.setattr(weights, "SOURCES", (row,))
    monkeypatch.delenv(weights.BASE_URL_VARIABLE, raising=False)
    server = Server()
    server.files[PATH] = BODY
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_fetch_downloads_once_into_the_models_folder(server, tmp_path):
    path = weights.fetch_weights("EfficientNetB0", base_url=server.url + "/", cache_dir=tmp_path)
    assert path == tmp_path / "models" / "efficientnetb0.h5"
    assert path.read_bytes() == BODY
    again = weights.fetch_weights(
        specs.get_spec("EfficientNetB0"), base_url=server.url, cache_dir=tmp_path
    )
    assert again == path
    assert server.requests == [PATH]
    assert files_in(tmp_path) == [path]


def test_the_base_address_and_the_cache_come_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv(weights.BASE_URL_VARIABLE, server.url)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert weights.fetch_weights("EfficientNetB0") == tmp_path / "models" / "efficientnetb0.h5"
    # The argument goes before the environment.
    with pytest.raises(weights.WeightsDownloadError, match="404"):
        weights.fetch_weights(
            "EfficientNetB0", base_url=server.url + "/elsewhere", cache_dir=tmp_path / "b"
        )


def test_a_file_address_is_a_mirror_too(server, tmp_path):
    mirror = tmp_path / "mirror" / "keras-applications"
    mirror.mkdir(parents=True)
    (mirror / "efficientnetb0.h5").write_bytes(BODY)
    path = weights.fetch_weights(
        "EfficientNetB0", base_url=mirror.parent.as_uri(), cache_dir=tmp_path / "cache"
    )
    assert path.read_bytes() == BODY


def test_a_wrong_hash_names_both_and_leaves_nothing(server, tmp_path):
    server.files[PATH] = b"something else"
    received = hashlib.md5(b"something else").hexdigest()
    with pytest.raises(
        weights.WeightsDownloadError,
        match=f"wrong md5.*Expected: {weights.SOURCES[0].md5}. Received: {received} .14 bytes",
    ) as error:
        weights.fetch_weights("EfficientNetB0", base_url=server.url, cache_dir=tmp_path)
    assert files_in(tmp_path) == []
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_a_damaged_copy_in_the_cache_is_replaced(server, tmp_path):
    target = tmp_path / "models" / "efficientnetb0.h5"
    target.parent.mkdir()
    target.write_bytes(BODY[:-1])
    path = weights.fetch_weights("EfficientNetB0", base_url=server.url, cache_dir=tmp_path)
    assert path.read_bytes() == BODY and files_in(tmp_path) == [target]


def test_half_a_download_is_refused_and_removed(server, tmp_path):
    server.cut = 200
    with pytest.raises(weights.WeightsDownloadError, match="Could not fetch the 'imagenet'"):
        weights.fetch_weights("EfficientNetB0", base_url=server.url, cache_dir=tmp_path)
    assert files_in(tmp_path) == []


def test_an_interrupted_download_leaves_nothing_under_the_final_name(server, tmp_path, monkeypatch):
    seen = []

    def interrupted(fname, cache_subdir, **_):
        Path(cache_subdir, fname).write_bytes(BODY[:10])
        seen.extend(path.name for path in files_in(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.utils, "get_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.fetch_weights("EfficientNetB0", base_url=server.url, cache_dir=tmp_path)
    assert len(seen) == 1 and "efficientnetb0.h5" not in seen
    assert files_in(tmp_path) == []


def test_no_network_is_one_clear_error(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        weights.WeightsDownloadError, match=f"refused.*mirror.*{weights.BASE_URL_VARIABLE}"
    ) as error:
        weights.fetch_weights("EfficientNetB0", base_url=server.url, cache_dir=tmp_path)
    assert error.value.__suppress_context__
    assert files_in(tmp_path) == []


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "models").write_text("not a folder")
    with pytest.raises(weights.WeightsDownloadError, match="Cannot write to .*KERAS_HOME"):
        weights.fetch_weights("EfficientNetB0", base_url=server.url, cache_dir=tmp_path)
    assert server.requests == []

    # A read-only folder. Its access rights would not stop the super-user, so the write fails here.
    def denied(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(weights.tempfile, "NamedTemporaryFile", denied)
    with pytest.raises(weights.WeightsDownloadError, match="Permission denied.*KERAS_HOME"):
        weights.fetch_weights("EfficientNetB0", base_url=server.url, cache_dir=tmp_path / "ro")
    # A good copy in it is used all the same.
    target = tmp_path / "ro" / "models" / "efficientnetb0.h5"
    target.write_bytes(BODY)
    assert target == weights.fetch_weights("EfficientNetB0", cache_dir=tmp_path / "ro")
    assert server.requests == []


def test_variants_without_official_file_say_which_exist(tmp_path):
    with pytest.raises(ValueError, match="no official file for EfficientNetTiny.*none at all.*B7"):
        weights.fetch_weights("EfficientNetTiny", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="EfficientNetB8: weights='advprop'"):
        weights.fetch_weights("EfficientNetB8", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="EfficientNetB0: weights='imagenet' with include_top"):
        weights.fetch_weights("EfficientNetB0", "imagenet21k", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="Unknown model 'EfficientNetB9'"):
        weights.fetch_weights("EfficientNetB9", cache_dir=tmp_path)
    assert files_in(tmp_path) == []


def test_a_base_address_needs_a_known_scheme(tmp_path, monkeypatch):
    monkeypatch.setenv(weights.BASE_URL_VARIABLE, "mirror.example/weights")
    with pytest.raises(ValueError, match="https.*Received: 'mirror.example/weights'"):
        weights.fetch_weights("EfficientNetB0", cache_dir=tmp_path)


CHECKPOINT = weights.WeightsSource(
    "EfficientNetB0", "advprop", True, "a/b0.tar.gz", None, 77.6, "them", "advprop"
)


@pytest.fixture
def storage(server):
    """A mirror that has the archive of a checkpoint, and tells its hashes as Google's does."""
    weights.SOURCES = (*weights.SOURCES, CHECKPOINT)  # The other fixture puts the true ones back.
    server.files["/mirror/a/b0.tar.gz"] = BODY
    md5 = base64.b64encode(hashlib.md5(BODY).digest()).decode()
    server.hashes["/mirror/a/b0.tar.gz"] = ["crc32c=AAAAAA==", f"md5={md5}"]
    return server


@pytest.mark.parametrize("include_top", [True, False])
def test_a_checkpoint_is_verified_by_the_hash_that_the_storage_tells(
    include_top, storage, tmp_path
):
    def fetch():
        return weights.fetch_weights(
            "EfficientNetB0", "advprop", include_top, base_url=storage.url, cache_dir=tmp_path
        )

    storage.cut = 100
    with pytest.raises(weights.WeightsDownloadError, match="--preprocessing advprop --output eff"):
        fetch()
    assert files_in(tmp_path) == []
    storage.cut = 0
    # Another training's archive has the same name.
    assert fetch() == tmp_path / "models" / "advprop-b0.tar.gz"
    assert fetch().read_bytes() == BODY
    assert storage.requests == ["/mirror/a/b0.tar.gz"] * 2


@pytest.mark.parametrize(
    ("told", "message"),
    [
        pytest.param([], "tells no MD5 hash", id="none"),
        pytest.param(["crc32c=AAAAAA=="], "tells no MD5 hash", id="another"),
        pytest.param(["md5=1B2M2Y8AsgTpgAmY7PhCfg=="], "wrong md5 hash.*d41d8cd98f00", id="wrong"),
    ],
)
def test_a_checkpoint_that_cannot_be_verified_is_refused(told, message, storage, tmp_path):
    storage.hashes["/mirror/a/b0.tar.gz"] = told
    with pytest.raises(weights.WeightsDownloadError, match=message):
        weights.fetch_weights("EfficientNetB0", "advprop", base_url=storage.url, cache_dir=tmp_path)
    assert files_in(tmp_path) == []


def test_locate_weights_takes_names_and_paths(server, tmp_path, monkeypatch):
    monkeypatch.setenv(weights.BASE_URL_VARIABLE, server.url)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert weights.locate_weights("EfficientNetB0", "imagenet").read_bytes() == BODY
    own = tmp_path / "own.h5"
    own.write_bytes(b"")
    assert weights.locate_weights("EfficientNetB0", str(own)) == own
    for wrong in ("imagent", tmp_path / "none.h5", 5):
        with pytest.raises(ValueError, match=r"one of \['imagenet'\], or the path .*Received"):
            weights.locate_weights("EfficientNetB0", wrong)


# --- Reading and loading every layout ---------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    return network(seed=1)


def save_whole_h5(model, path):
    # Keras advises its own format against the legacy one, by `logging`.
    model.save(path)
    return path


LAYOUTS = {
    "legacy": lambda m, d: write_legacy(d / "w.h5", m),
    "legacy, split attributes": lambda m, d: write_legacy(d / "w.h5", m, chunked=True),
    "legacy, numbered normalization": lambda m, d: write_legacy(
        d / "w.h5", m, rename=lambda n: "normalization_3" if n == "normalization" else n
    ),
    "legacy whole model": lambda m, d: write_legacy(d / "w.h5", m, root="model_weights"),
    "Keras 3 whole model": lambda m, d: save_whole_h5(m, d / "w.h5"),
    ".weights.h5": lambda m, d: m.save_weights(d / "w.weights.h5") or d / "w.weights.h5",
    ".weights.h5 without names": lambda m, d: (
        m.save_weights(d / "w.weights.h5") or without_names(d / "w.weights.h5")
    ),
    ".keras": lambda m, d: m.save(d / "w.keras") or d / "w.keras",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_exactly(layout, reference, tmp_path):
    path = LAYOUTS[layout](reference, tmp_path)
    model = network(seed=2)
    report = weights.load_weights(model, path)
    assert_same(model, reference)
    np.testing.assert_array_equal(outputs(model), outputs(reference))
    assert report == weights.LoadReport(
        origin=str(path),
        loaded=(
            "normalization",
            "stem_conv",
            "stem_bn",
            "block1a_dwconv",
            "block1a_bn",
            "top_conv",
            "predictions",
        ),
        skipped_head=None,
        adapted_stem=False,
        mended_normalization=False,
        ignored=(),
        kept=(),
    )


def test_the_extension_of_a_file_does_not_matter(reference, tmp_path):
    reference.save(tmp_path / "w.keras")
    (tmp_path / "w.keras").rename(tmp_path / "w.h5")
    model = network(seed=2)
    weights.load_weights(model, tmp_path / "w.h5")
    assert_same(model, reference)


def nested(inner, sequential):
    pieces = [inner, keras.layers.Dense(5, name="mine")]
    if sequential:
        return keras.Sequential([keras.Input(inner.input_shape[1:]), *pieces])
    x = inputs = keras.Input(inner.input_shape[1:])
    for piece in pieces:
        x = piece(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras", "counted"])
def test_a_network_nested_in_a_larger_model_loads(suffix, sequential, tmp_path):
    inner = network(classes=None, seed=3)
    outer = nested(inner, sequential)
    outer.compile("adam", "mse")
    outer.optimizer.build(outer.trainable_variables)  # Optimizer weights lie in the same file.
    path = tmp_path / f"w{suffix.replace('counted', '.weights.h5')}"
    if "weights" in path.name:
        outer.save_weights(path)
    else:
        outer.save(path)
    if suffix == "counted":
        without_names(path)
    model = network(classes=None, seed=4)
    report = weights.load_weights(model, path)
    assert_same(model, inner)
    assert report.ignored == (("dense",) if suffix == "counted" else ("mine",))


def test_two_networks_in_one_file_are_refused(tmp_path):
    inputs = keras.Input((8, 8, 3))
    both = keras.Model(inputs, [network(name="a")(inputs), network(name="b")(inputs)])
    both.save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(weights.WeightsFileError, match="holds 2 EfficientNets.*get_layer"):
        weights.read_weights(tmp_path / "w.weights.h5")


def test_bfloat16_is_read_exactly(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    try:
        half = network(preprocessing=None, seed=5)
    finally:
        keras.config.set_dtype_policy("float32")
    half.save_weights(tmp_path / "w.weights.h5")
    model = network(preprocessing=None)
    weights.load_weights(model, tmp_path / "w.weights.h5")
    for name, array in arrays(model).items():
        layer, variable = name.split("/")
        stored = next(v for v in half.get_layer(layer).weights if v.name == variable)
        expected = keras.ops.convert_to_numpy(keras.ops.cast(stored, "float32"))
        np.testing.assert_array_equal(array, expected, err_msg=name)


def torch_archive():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return data.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no weights file of Keras.*0 bytes"),
        (b"layer,kernel\n", "no weights file of Keras.*layer,kernel"),
        (b"\x80\x04\x95pickle-of-somebody", "a pickle .*can execute code"),
        (torch_archive(), "a PyTorch file"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{}", "a safetensors file"),
        (b"\x1c\x00\x00\x00TFL3....", "a TFLite model"),
        (b"PK\x03\x04 and no more", "damaged or incomplete"),
    ],
)
def test_other_files_are_refused_with_a_hint(content, message, tmp_path):
    path = tmp_path / "w.h5"
    path.write_bytes(content)
    with pytest.raises(weights.WeightsFileError, match=message) as error:
        weights.read_weights(path)
    assert str(path) in str(error.value)


def test_checkpoints_folders_and_absent_files_are_refused(tmp_path):
    (tmp_path / "ckpt.index").write_bytes(b"\0")
    (tmp_path / "ckpt.data-00000-of-00001").write_bytes(b"\0")
    for name in ("ckpt", "ckpt.index", "ckpt.data-00000-of-00001"):
        with pytest.raises(weights.WeightsFileError, match="a TensorFlow checkpoint"):
            weights.read_weights(tmp_path / name)
    with pytest.raises(weights.WeightsFileError, match="SavedModel"):
        weights.read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights file .*none.h5"):
        weights.read_weights(tmp_path / "none.h5")


@pytest.mark.parametrize("layout", ["legacy", ".weights.h5", ".keras"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files_are_refused(layout, share, reference, tmp_path):
    path = LAYOUTS[layout](reference, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    model = network(seed=2)
    with pytest.raises(weights.WeightsFileError, match="damaged or incomplete"):
        weights.load_weights(model, path)
    assert_same(model, network(seed=2))


def test_a_flipped_bit_in_an_archive_is_noticed(reference, tmp_path):
    path = LAYOUTS[".keras"](reference, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(weights.WeightsFileError, match="damaged or incomplete"):
        weights.read_weights(path)


def test_hdf5_files_of_other_kinds_are_refused(reference, tmp_path):
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file["features/x"] = np.zeros(3)
    with pytest.raises(weights.WeightsFileError, match="without weights of Keras layers"):
        weights.read_weights(path)

    write_legacy(path, reference)
    with h5py.File(path, "r+") as file:
        del file["stem_conv/stem_conv/kernel:0"]
    with pytest.raises(weights.WeightsFileError, match="stem_conv/kernel:0 is named but not"):
        weights.read_weights(path)


def test_tensors_that_lie_elsewhere_or_are_absurd_are_refused(reference, tmp_path):
    other = write_legacy(tmp_path / "other.h5", reference)
    path, name = tmp_path / "w.h5", "stem_conv/stem_conv/kernel:0"

    def damaged(replacement):
        write_legacy(path, reference)
        with h5py.File(path, "r+") as file:
            del file[name]
            replacement(file)
        return path

    def external(file):
        file[name] = h5py.ExternalLink(other, name)

    def raw(file):
        # The bytes are those of any file that the reader may read.
        file.create_dataset(name, (4,), "f4", external=[(str(other), 0, 16)])

    def huge(file):
        file.create_dataset(name, (1 << 20, 1 << 10), chunks=(1024, 1024), dtype="f4")

    def text(file):
        file[name] = "no number"

    for replacement, message in (
        (external, "named but not there"),
        (raw, "lies in another file"),
        (huge, "declares 4294967296 bytes"),
        (text, "holds no numbers"),
    ):
        with pytest.raises(weights.WeightsFileError, match=message):
            weights.read_weights(damaged(replacement))


# --- What does not fit ------------------------------------------------------------------------


def test_one_error_lists_everything_and_nothing_is_loaded(reference):
    stored = in_memory(reference)
    del stored.layers["stem_bn"]
    del stored.layers["block1a_bn"]["beta"]
    stored.layers["block9z_conv"] = {"kernel": np.zeros((1, 1))}
    stored.layers["top_conv"]["kernel"] = np.zeros((1, 1, 8, 7), "float32")
    model = network(seed=2)
    with pytest.raises(weights.WeightsMismatchError) as error:
        weights.load_weights(model, stored)
    message = str(error.value)
    assert "do not fit model 'network'; nothing was loaded" in message
    assert (
        "Missing in the file (5): stem_bn/gamma, stem_bn/beta, stem_bn/moving_mean, "
        "stem_bn/moving_variance, block1a_bn/beta\n" in message
    )
    assert "Unexpected, not in the model (1): block9z_conv/kernel\n" in message
    assert "Misshapen (1): top_conv/kernel (model (1, 1, 8, 6), file (1, 1, 8, 7))" in message
    assert isinstance(error.value, ValueError)
    assert_same(model, network(seed=2))


def in_memory(model):
    layers = {}
    for name, array in arrays(model).items():
        layer, variable = name.split("/")
        layers.setdefault(layer, {})[variable] = array
    return weights.StoredWeights("memory", layers)


def test_long_lists_are_cut_and_counted(reference):
    stored = in_memory(reference)
    stored.layers.update({f"extra{i}": {"kernel": np.zeros(1)} for i in range(25)})
    with pytest.raises(
        weights.WeightsMismatchError, match=r"model \(25\): extra0/.*extra19/kernel, … and 5 more\n"
    ):
        weights.load_weights(network(), stored)


def test_the_error_tells_what_counted_layers_are(reference, tmp_path):
    path = LAYOUTS[".weights.h5 without names"](reference, tmp_path)
    with pytest.raises(weights.WeightsMismatchError, match="holds no layer names.*by class"):
        weights.load_weights(network(filters=16), path)


def planned_weights(spec):
    """The shapes of a variant's convolutions, without building it."""
    return {
        conv.name: {"kernel": np.broadcast_to(np.float32(0), (1, 1, 1, conv.output_filters))}
        for conv in scaling.resolve(spec).convolutions
    }


@pytest.mark.parametrize("model", specs.SPECS)
def test_weights_of_another_variant_are_recognised(model, reference):
    stored = weights.StoredWeights("other.h5", planned_weights(model))
    with pytest.raises(weights.WeightsMismatchError, match=f"The file fits {model}: build that"):
        weights.load_weights(reference, stored)


def test_weights_of_no_variant_are_not_taken_for_one(reference):
    stored = planned_weights("EfficientNetB0")
    stored["top_conv"] = {"kernel": np.zeros((1, 1, 1, 900))}
    with pytest.raises(weights.WeightsMismatchError, match="Build the model with the arguments"):
        weights.load_weights(reference, weights.StoredWeights("other.h5", stored))


def test_layers_of_ones_own_are_left_out_on_request(reference):
    stored = in_memory(reference)
    stored.layers["my_head"] = {"kernel": np.zeros((6, 2))}
    model = network(seed=2)
    with pytest.raises(weights.WeightsMismatchError, match="my_head/kernel\nLeave .*`ignore="):
        weights.load_weights(model, stored)
    report = weights.load_weights(model, stored, ignore=["my_*"])
    assert report.ignored == ("my_head",)
    assert_same(model, reference)
    with pytest.raises(TypeError, match="sequence of patterns. Received: 'my_"):
        weights.load_weights(model, stored, ignore="my_*")


def test_models_that_cannot_be_loaded_into_are_refused(reference):
    stored = in_memory(reference)
    with pytest.raises(TypeError, match="Keras model. Received: str"):
        weights.load_weights("EfficientNetB0", stored)
    with pytest.raises(ValueError, match=r"contains other models: \['network'\].*get_layer"):
        weights.load_weights(nested(network(), sequential=False), stored)
    inputs = keras.Input((8,))
    with pytest.raises(ValueError, match="has no weights"):
        weights.load_weights(keras.Model(inputs, keras.layers.ReLU()(inputs)), stored)


def test_layers_in_front_of_the_network_keep_their_weights():
    def in_front(x):
        x = keras.Sequential([keras.layers.RandomFlip()], name="augmentation")(x)
        x = keras.layers.Conv2D(3, 1, name="adaptor")(x)
        return keras.layers.Rescaling([127.5, 127.5, 127.5], 127.5, name="to_pixels")(x)

    reference, inputs = with_normalization(STD), keras.Input((8, 8, 5))
    core = network(seed=2)
    # The same layers once more, upon other layers, as `input_tensor` does it.
    x = in_front(inputs)
    for layer in core.layers[1:]:
        x = layer(x)
    model = keras.Model(inputs, x)
    before = arrays(model)
    report = weights.load_weights(model, in_memory(reference))
    assert report.kept == ("adaptor",)
    assert report.mended_normalization  # The caller's `Rescaling` is not the one that mends.
    after = arrays(model)
    for name in ("adaptor/kernel", "adaptor/bias"):
        np.testing.assert_array_equal(after[name], before[name])
    assert_same(model, reference, skip=["adaptor", "normalization"])
    # A file that has them, too, loads them.
    stored = in_memory(model)
    stored.layers["adaptor"]["bias"] = np.ones(3)
    assert weights.load_weights(model, stored).kept == ()
    np.testing.assert_array_equal(arrays(model)["adaptor/bias"], np.ones(3))


# --- The classifier ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["legacy", ".weights.h5", ".weights.h5 without names"])
def test_another_number_of_classes_keeps_the_models_classifier(layout, reference, tmp_path):
    path = LAYOUTS[layout](reference, tmp_path)
    model = network(classes=7, seed=2)
    with pytest.warns(UserWarning, match="keeps the weights it had: the model has 7 .* file 4"):
        report = weights.load_weights(model, path)
    assert report.skipped_head == "the model has 7 classes, the file 4"
    assert "predictions" not in report.loaded
    assert_same(model, reference, skip=["predictions"])
    own = arrays(network(classes=7, seed=2))
    for name in ("predictions/kernel", "predictions/bias"):
        np.testing.assert_array_equal(arrays(model)[name], own[name])


@pytest.mark.parametrize("layout", ["legacy", ".weights.h5", ".weights.h5 without names"])
def test_a_file_without_classifier_keeps_the_models(layout, tmp_path):
    headless = network(classes=None, seed=1)
    path = LAYOUTS[layout](headless, tmp_path)
    model = network(seed=2)
    with pytest.warns(UserWarning, match="the file has no classifier"):
        report = weights.load_weights(model, path)
    assert report.skipped_head == "the file has no classifier"
    assert_same(model, headless, skip=["predictions"])
    np.testing.assert_array_equal(
        arrays(model)["predictions/kernel"], arrays(network(seed=2))["predictions/kernel"]
    )


@pytest.mark.parametrize("layout", ["legacy", ".weights.h5", ".weights.h5 without names"])
def test_a_model_without_classifier_takes_a_file_with_one(layout, reference, tmp_path):
    path = LAYOUTS[layout](reference, tmp_path)
    model = network(classes=None, seed=2)
    report = weights.load_weights(model, path)
    assert report.skipped_head is None and report.ignored == ("predictions",)
    assert_same(model, reference)


def test_a_classifier_of_another_width_is_a_mismatch(reference):
    stored = in_memory(reference)
    stored.layers["predictions"] = {"kernel": np.zeros((9, 7)), "bias": np.zeros(7)}
    with pytest.raises(weights.WeightsMismatchError, match=r"predictions/kernel \(model \(6, 4\)"):
        weights.load_weights(network(), stored)


def test_an_ignored_classifier_is_no_reason_to_warn(reference):
    model = network(seed=2)
    report = weights.load_weights(model, in_memory(reference), ignore=["predictions"])
    assert report.skipped_head == "it was to be ignored"
    assert report.ignored == ("predictions",)


# --- Input channels ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_the_stem_is_adapted_to_other_channels(channels, reference, tmp_path):
    path = LAYOUTS["legacy"](reference, tmp_path)
    model = network(channels=channels, seed=2)
    report = weights.load_weights(model, path)
    assert report.adapted_stem
    rgb, adapted = arrays(reference), arrays(model)
    kernel = rgb["stem_conv/kernel"]
    mean, variance = rgb["normalization/mean"], rgb["normalization/variance"]
    for channel in range(channels):
        if channels == 1:
            expected = kernel[:, :, 0] + kernel[:, :, 1] + kernel[:, :, 2]
            statistics = mean.mean(), np.sqrt(variance).mean() ** 2
        else:
            expected = kernel[:, :, channel % 3] * 3 / channels
            statistics = mean[channel % 3], variance[channel % 3]
        np.testing.assert_allclose(
            adapted["stem_conv/kernel"][:, :, channel], expected, rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(
            (
                adapted["normalization/mean"][channel],
                adapted["normalization/variance"][channel],
            ),
            statistics,
            rtol=1e-6,
        )
    assert_same(model, reference, skip=["stem_conv", "normalization"])


@pytest.mark.parametrize("channels", [1, 6])
def test_an_adapted_stem_sees_a_grey_image_as_before(channels):
    reference = network(preprocessing=None, seed=1)
    model = network(channels=channels, preprocessing=None, seed=2)
    weights.load_weights(model, in_memory(reference))
    grey = np.random.default_rng(0).uniform(0, 1, (2, 8, 8, 1)).astype("float32")
    expected = keras.ops.convert_to_numpy(reference(np.repeat(grey, 3, axis=-1)))
    received = keras.ops.convert_to_numpy(model(np.repeat(grey, channels, axis=-1)))
    np.testing.assert_allclose(received, expected, atol=REORDERED * np.abs(expected).max())


def test_weights_of_as_many_channels_are_not_adapted(tmp_path):
    reference, model = network(channels=4, seed=1), network(channels=4, seed=2)
    report = weights.load_weights(model, in_memory(reference))
    assert not report.adapted_stem
    assert_same(model, reference)
    with pytest.raises(weights.WeightsMismatchError, match="stem_conv/kernel .model .3, 3, 3, 8"):
        weights.load_weights(network(), in_memory(reference))


# --- Normalization ----------------------------------------------------------------------------


def with_normalization(variance, **arguments):
    model = network(seed=1, **arguments)
    set_normalization(model.get_layer("normalization"), MEAN, variance)
    return model


def test_standard_deviations_are_squared(tmp_path):
    official = with_normalization(STD)
    model = network(seed=2)
    report = weights.load_weights(model, LAYOUTS["legacy"](official, tmp_path))
    assert report.mended_normalization
    np.testing.assert_allclose(arrays(model)["normalization/variance"], STD**2, rtol=1e-6)
    np.testing.assert_array_equal(arrays(model)["normalization/mean"], MEAN)
    assert_same(model, official, skip=["normalization"])


@pytest.mark.parametrize("variance", [STD**2, np.array([0.052441, 0.050176, 0.050625]), np.ones(3)])
def test_variances_are_left_alone(variance):
    reference = with_normalization(variance)
    model = network(seed=2)
    report = weights.load_weights(model, in_memory(reference))
    assert not report.mended_normalization
    assert_same(model, reference)
    np.testing.assert_array_equal(outputs(model), outputs(reference))


def test_a_graph_with_the_second_rescaling_keeps_standard_deviations():
    official = with_normalization(STD, second_rescaling=True)
    model = network(seed=2, second_rescaling=True)
    report = weights.load_weights(model, in_memory(official))
    assert not report.mended_normalization
    np.testing.assert_array_equal(outputs(model), outputs(official))


def test_mended_constants_equal_the_second_rescaling(tmp_path):
    official = with_normalization(STD, second_rescaling=True)
    official.save_weights(tmp_path / "w.weights.h5")
    model = network(seed=2)
    weights.load_weights(model, tmp_path / "w.weights.h5")
    expected = outputs(official)
    tolerance = REORDERED * np.abs(expected).max()
    np.testing.assert_allclose(outputs(model), expected, rtol=0, atol=tolerance)
    # Without the mending the outputs differ by far more than that.
    set_normalization(model.get_layer("normalization"), MEAN, STD)
    assert np.abs(outputs(model) - expected).max() > 1000 * tolerance


def test_standard_deviations_are_mended_before_channels_are_adapted():
    model = network(channels=1, seed=2)
    weights.load_weights(model, in_memory(with_normalization(STD)))
    np.testing.assert_allclose(
        arrays(model)["normalization/variance"], [STD.mean() ** 2], rtol=1e-6
    )


@pytest.mark.parametrize("preprocessing", ["constants", None])
def test_a_file_without_normalization_leaves_the_models(preprocessing):
    reference = network(preprocessing=preprocessing, seed=1)
    model = network(seed=2)
    report = weights.load_weights(model, in_memory(reference))
    assert "normalization" not in report.loaded
    own = arrays(network(seed=2))
    for name in ("normalization/mean", "normalization/variance"):
        np.testing.assert_array_equal(arrays(model)[name], own[name])
    assert_same(model, reference, skip=["normalization"])


@pytest.mark.parametrize("layout", ["legacy", ".weights.h5", ".weights.h5 without names"])
@pytest.mark.parametrize("preprocessing", ["constants", None])
def test_a_model_without_normalization_weights_ignores_the_files(
    layout, preprocessing, reference, tmp_path
):
    model = network(preprocessing=preprocessing, seed=2)
    before = outputs(model)
    report = weights.load_weights(model, LAYOUTS[layout](reference, tmp_path))
    assert report.ignored == ("normalization",)
    assert_same(model, reference)
    assert np.abs(outputs(model) - before).max() > 0


def test_the_count_of_normalization_may_have_any_shape_or_be_absent(reference):
    for count in (np.zeros((1,), "int64"), None):
        stored = in_memory(reference)
        del stored.layers["normalization"]["count"]
        if count is not None:
            stored.layers["normalization"]["count"] = count
        model = network(seed=2)
        weights.load_weights(model, stored)
        np.testing.assert_array_equal(outputs(model), outputs(reference))


# --- keras.applications -----------------------------------------------------------------------

B0 = keras.applications.EfficientNetB0
SMALL = {"weights": None, "input_shape": (32, 32, 3), "classes": 5}


@pytest.fixture(scope="module")
def applications_b0():
    model = B0(**SMALL)
    randomize(model, 1)
    return model


@pytest.fixture(scope="module")
def other_b0():
    return B0(**SMALL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keras_applications_files_load_exactly(layout, applications_b0, other_b0, tmp_path):
    path = LAYOUTS[layout](applications_b0, tmp_path)
    model = other_b0
    randomize(model, 2)
    report = weights.load_weights(model, path)
    assert len(report.loaded) == 132
    for mine, theirs in zip(model.get_weights(), applications_b0.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(outputs(model, side=32), outputs(applications_b0, side=32))


@pytest.fixture
def imagenet_b0(applications_b0, tmp_path, monkeypatch):
    """The graph of `weights="imagenet"` and a file like the official one, of random weights.

    keras.applications builds that graph only around a download; the download alone is replaced.
    """
    source = B0(**{**SMALL, "classes": 1000})
    randomize(source, 1)
    normalization = next(x for x in source.layers if isinstance(x, keras.layers.Normalization))
    set_normalization(normalization, MEAN, STD)
    path = write_legacy(
        tmp_path / "efficientnetb0.h5",
        source,
        rename=lambda name: "normalization" if name.startswith("normalization") else name,
    )
    file_utils = sys.modules["keras.src.utils.file_utils"]
    monkeypatch.setattr(file_utils, "get_file", lambda *_, **__: str(path))
    # With its classifier, this graph takes images of 224 x 224 alone.
    return B0(weights="imagenet"), path


def test_outputs_equal_the_imagenet_graph_of_keras_applications(imagenet_b0, tmp_path):
    official, path = imagenet_b0
    assert sum(isinstance(layer, keras.layers.Rescaling) for layer in official.layers) == 2
    expected = outputs(official, side=224)
    assert np.ptp(expected) > 0.01 * np.abs(expected).max()
    tolerance = REORDERED * np.abs(expected).max()
    official.save_weights(tmp_path / "counted.weights.h5")
    without_names(tmp_path / "counted.weights.h5")
    for file in (path, tmp_path / "counted.weights.h5"):
        model = B0(weights=None)
        report = weights.load_weights(model, file)
        assert report.mended_normalization
        np.testing.assert_allclose(outputs(model, side=224), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, constructor, classes",
    [
        ("efficientnetv2-b0.h5", keras.applications.EfficientNetV2B0, 1000),
        ("efficientnetb0-flowers5.h5", keras.applications.EfficientNetB0, 5),
    ],
)
def test_trained_files_load_as_keras_itself_loads_them(file, constructor, classes):
    path = SHARED / "weights" / file
    if not path.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{path} is absent")
        pytest.skip(f"trained weights are absent: {path}")
    theirs = constructor(weights=None, classes=classes)
    theirs.load_weights(path)
    mine = constructor(weights=None, classes=classes)
    report = weights.load_weights(mine, path)
    assert report.skipped_head is None and not report.mended_normalization
    np.testing.assert_array_equal(outputs(mine, side=224), outputs(theirs, side=224))


# --- Our models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model = keras_effnet.EfficientNetTiny(weights=None, classes=5)
    randomize(model, 1)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_models_load_their_own_files(layout, tiny, tmp_path):
    path = LAYOUTS[layout](tiny, tmp_path)
    model = keras_effnet.EfficientNetTiny(weights=path, classes=5)
    assert_same(model, tiny)
    np.testing.assert_array_equal(outputs(model, side=32), outputs(tiny, side=32))


# Constants that no default has, so that whatever loses them is noticed.
ODD = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def odd_tiny(stored_in_weights):
    spec = specs.get_spec("EfficientNetTiny")
    preprocessing = replace(spec.preprocessing, stored_in_weights=stored_in_weights, **ODD)
    spec = replace(spec, preprocessing=preprocessing)
    return keras_effnet.create_model(spec, weights=None, classes=5)


def by_keras(model, folder):
    model.save(folder / "m.keras")
    return keras.models.load_model(folder / "m.keras")


def by_json(model, folder):
    model.save_weights(folder / "m.weights.h5")
    copy = keras.models.model_from_json(model.to_json())
    copy.load_weights(folder / "m.weights.h5")
    return copy


def by_our_loader(suffix):
    def trip(model, folder):
        path = folder / f"m{suffix}"
        (model.save if suffix == ".keras" else model.save_weights)(path)
        copy = keras.models.model_from_json(model.to_json())
        weights.load_weights(copy, path)
        return copy

    return trip


@pytest.mark.parametrize("stored_in_weights", [True, False])
@pytest.mark.parametrize(
    "trips",
    # Some losses show in the copy of a copy alone.
    [(by_keras, by_keras), (by_json,), (by_our_loader(".keras"),), (by_our_loader(".weights.h5"),)],
    ids=["keras twice", "json", "ours from .keras", "ours from .weights.h5"],
)
def test_normalization_constants_survive_every_save_and_load(trips, stored_in_weights, tmp_path):
    model = odd_tiny(stored_in_weights)
    randomize(model, 1, normalization=False)
    copy = model
    for trip in trips:
        copy = trip(copy, tmp_path)
        layer = copy.get_layer("normalization")
        mean, variance = (
            keras.ops.convert_to_numpy(value).ravel() for value in (layer.mean, layer.variance)
        )
        np.testing.assert_allclose(mean, ODD["mean"], rtol=1e-6)
        np.testing.assert_allclose(variance, np.square(ODD["std"]), rtol=1e-6)
        np.testing.assert_array_equal(outputs(copy, side=32), outputs(model, side=32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["EfficientNetB0", "EfficientNetB3", "EfficientNetV2B0", "EfficientNetV2S"]
)
def test_our_outputs_equal_those_of_keras_applications(model, tmp_path):
    theirs = getattr(keras.applications, model)(weights=None)
    randomize(theirs, 1)
    for layer in theirs.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.weights:
            set_normalization(layer, MEAN)
    side = theirs.input_shape[1]
    expected = outputs(theirs, side=side)
    assert np.ptp(expected) > 0.01 * np.abs(expected).max()
    for layout in ("legacy", ".weights.h5", ".weights.h5 without names"):
        path = LAYOUTS[layout](theirs, tmp_path)
        mine = keras_effnet.create_model(model, weights=path)
        np.testing.assert_allclose(outputs(mine, side=side), expected, rtol=0, atol=REORDERED)
