import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_effnet import data
from keras_effnet.data import Labels, open_images, read_labels
from keras_effnet.preprocessing import crop_and_resize, preprocess
from keras_effnet.specs import get_spec

SPEC = get_spec("EfficientNetTiny").preprocessing
SIZE = (16, 16)
FLOWERS = ("daisy", "rose", "tulip")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def photograph(seed, size=(20, 24)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_image(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(seed)).save(path, **options)
    return path


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.fixture
def folder(tmp_path):
    """4 daisies, 3 roses and 2 tulips."""
    root = tmp_path / "images"
    for flower, count in zip(FLOWERS, (4, 3, 2), strict=True):
        for index in range(count):
            write_image(root / flower / f"{index}.png", seed=10 * len(flower) + index)
    return root


def images_of(dataset, batch_size=4):
    return np.concatenate([images for images, _ in dataset.batches(batch_size)])


def opened(source, **arguments):
    return open_images(source, SIZE, **{"preprocessing": SPEC, **arguments})


# Labels


@pytest.mark.parametrize(
    "text",
    [
        "index,wnid,name\n0,n1,tench\n1,n2,crane\n2,n3,crane\n",
        "\ufeffindex,wnid,name\r\n0,n1,tench\r\n1,n2,crane\r\n2,n3,crane\r\n\r\n\r\n",
        'name,ID,index\n\ncrane,"n3",2\ntench,n1,0\n\ncrane , n2,1',
    ],
)
def test_labels_table(tmp_path, text):
    path = tmp_path / "classes.csv"
    path.write_bytes(text.encode())
    labels = read_labels(path)
    assert labels == Labels(("tench", "crane", "crane"), ("n1", "n2", "n3"))
    assert len(labels) == 3
    assert [labels.find(label) for label in ("n3", "Tench", "n4", "")] == [2, 0, None, None]
    with pytest.raises(ValueError, match="'crane' is the name of the classes 1, 2.*n2, n3"):
        labels.find("crane")


@pytest.mark.parametrize(
    "text",
    ["great white shark\nhen, female\n", "\ufeffgreat white shark\r\nhen, female\r\n\r\n \r\n"],
)
def test_labels_text(tmp_path, text):
    path = tmp_path / "labels.txt"
    path.write_bytes(text.encode())
    labels = read_labels(path)
    assert labels == Labels(("great white shark", "hen, female"))
    assert labels.find("Great_White-shark") == 0


def test_an_id_comes_before_a_name():
    labels = Labels(names=("1", "0"), ids=("0", "1"))
    assert labels.find("0") == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "at least one class"),
        ("a.txt", b"rose\n\ntulip\n", "Line 2 is empty"),
        ("a.txt", b"rose\ntulip\nrose\n", "own name. Received more than once: rose"),
        ("a.txt", "rose\ntulip".encode("utf-16"), "not UTF-8 text"),
        ("a.csv", b"", "must be the header `index,id,name`"),
        ("a.csv", b"0,n1,rose\n1,n2,tulip\n", r"header.*Received: \['0', 'n1', 'rose'\]"),
        ("a.csv", b"index,id,name\n", "at least one class"),
        ("a.csv", b"index,name\n0,rose\n2,tulip\n3,daisy\n", "without a hole. Missing: 1"),
        ("a.csv", b"index,name\n1,rose\n2,tulip\n", "Missing: 0"),
        ("a.csv", b"index,name\n0,rose\n0,tulip\n", "Line 3: the index 0 .* second time"),
        ("a.csv", b"index,id,name\n0,n1,rose\n1,n1,tulip\n", "own id. Received more than once: n1"),
        ("a.csv", b"index,name\n0,rose\n1,rose\n", "own name. Received more than once: rose"),
        ("a.csv", b"index,name\n0,\n", "Line 2: the class 0 has no name"),
        ("a.csv", b"index,name\nzero,rose\n", "Line 2: the index is no number.*'zero'"),
        ("a.csv", b"index,name\n0,rose,red\n", "Line 2 has 3 values, the header has 2"),
        ("a.csv", b'index,name\n0,"' + b"x" * 200_000, "Line 2 is not comma-separated text"),
    ],
)
def test_bad_labels(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"Labels file .*{name}.*{message}"):
        read_labels(tmp_path / name)


def test_no_labels_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no labels file.*none.txt"):
        read_labels(tmp_path / "none.txt")


def test_ids_and_names_of_other_lengths():
    with pytest.raises(ValueError, match="1 ids and 2 names"):
        Labels(("rose", "tulip"), ("n1",))


# Folders


def test_class_folder(folder):
    dataset = opened(folder, classes=3)
    assert len(dataset) == 9
    assert dataset.skipped == ()
    assert [path.relative_to(folder).as_posix() for path in dataset.paths] == (
        [f"daisy/{i}.png" for i in range(4)]
        + [f"rose/{i}.png" for i in range(3)]
        + [f"tulip/{i}.png" for i in range(2)]
    )
    np.testing.assert_array_equal(dataset.labels, [0, 0, 0, 0, 1, 1, 1, 2, 2])
    batches = list(dataset.batches(4))
    assert [images.shape for images, _ in batches] == [
        (4, 16, 16, 3),
        (4, 16, 16, 3),
        (1, 16, 16, 3),
    ]
    assert {images.dtype for images, _ in batches} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), dataset.labels)
    expected = [crop_and_resize(Image.open(path), SIZE, SPEC) for path in dataset.paths]
    np.testing.assert_array_equal(images_of(dataset), expected)


def test_every_pass_is_the_same(folder):
    dataset = opened(folder)
    first = images_of(dataset)
    half_way = dataset.batches(2)
    next(half_way)
    np.testing.assert_array_equal(images_of(dataset, 9), first)
    half_way.close()
    np.testing.assert_array_equal(images_of(dataset, 1), first)


def test_transform_outside_the_graph(folder):
    pixels = images_of(opened(folder))
    transformed = images_of(opened(folder, in_graph_preprocessing=False))
    np.testing.assert_array_equal(transformed, preprocess(pixels, SPEC))
    assert np.abs(transformed - pixels).max() > 100


@pytest.mark.parametrize("crop", ["center", "stretch"])
def test_crop_is_handed_on(folder, crop):
    dataset = opened(folder, crop=crop)
    expected = [crop_and_resize(Image.open(path), SIZE, SPEC, crop) for path in dataset.paths]
    np.testing.assert_array_equal(images_of(dataset), expected)


def test_flat_folder(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.webp", "d.bmp", "e.jpeg"):
        write_image(tmp_path / name)
    dataset = opened(str(tmp_path), classes=3)
    assert [path.name for path in dataset.paths] == ["a.PNG", "b.jpg", "c.webp", "d.bmp", "e.jpeg"]
    assert dataset.labels is None
    assert all(labels is None for _, labels in dataset.batches(2))


def test_one_image(tmp_path):
    dataset = opened(write_image(tmp_path / "panda.png"))
    assert len(dataset) == 1 and dataset.labels is None


def test_other_files_are_ignored(folder):
    (folder / "readme.txt").write_text("flowers")
    (folder / ".cache").mkdir()
    write_image(folder / ".cache" / "x.png")
    (folder / "rose" / "Thumbs.db").write_bytes(b"x")
    (folder / "rose" / "._1.png").write_bytes(b"x")
    (folder / "rose" / ".DS_Store").write_bytes(b"x")
    dataset = opened(folder, classes=3)
    assert len(dataset) == 9 and dataset.skipped == ()


def test_folders_matched_by_the_labels_file(folder):
    # Fewer folders than classes, by id and by name; an empty folder has no class.
    labels = Labels(
        names=("moss", "Tulip", "common daisy", "dog rose"), ids=("n0", "n1", "n2", "rose")
    )
    (folder / "daisy").rename(folder / "common_daisy")
    (folder / "empty").mkdir()
    dataset = opened(folder, labels=labels, classes=4)
    np.testing.assert_array_equal(dataset.labels, [2, 2, 2, 2, 3, 3, 3, 1, 1])


def test_unmatched_class_folders(folder):
    labels = Labels(("daisies", "roses", "tulip", "moss"))
    with pytest.raises(
        ValueError,
        match=r"Class folders .*'daisy' \(closest: daisies\), 'rose' \(closest: roses\)$",
    ):
        opened(folder, labels=labels)
    with pytest.raises(ValueError, match=r"'daisy' \(closest: none\)"):
        opened(folder, labels=Labels(("rose", "tulip", "xyz")))


def test_two_folders_of_one_class(folder):
    labels = Labels(names=("daisy", "rose", "tulip"), ids=("n0", "n1", "n2"))
    write_image(folder / "n1" / "0.png")
    with pytest.raises(ValueError, match="name the same class: n1, rose. Merge"):
        opened(folder, labels=labels)


def test_folders_of_an_ambiguous_name(folder):
    labels = Labels(names=("daisy", "rose", "tulip", "Rose"), ids=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="'rose' is the name of the classes 1, 3.*id: b, d"):
        opened(folder, labels=labels)


def test_number_of_class_folders(folder):
    with pytest.raises(
        ValueError, match="3 sub-folders.*has 5 classes.*labels file.*daisy, rose, tulip"
    ):
        opened(folder, classes=5)
    with pytest.raises(ValueError, match="labels name 2 classes, but the model has 3"):
        opened(folder, classes=3, labels=Labels(("a", "b")))


def test_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images \(.jpg.*webp\)"):
        opened(tmp_path)
    (tmp_path / "rose").mkdir()
    (tmp_path / "rose" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no images"):
        opened(tmp_path)
    write_image(tmp_path / "train" / "rose" / "0.png")
    with pytest.raises(ValueError, match="holds no images.*more folders inside train"):
        opened(tmp_path)


def test_mixed_layouts(folder):
    write_image(folder / "rose" / "red" / "0.png")
    with pytest.raises(ValueError, match="hold folders themselves.*Received: rose.red"):
        opened(folder)
    write_image(folder / "0.png")
    with pytest.raises(ValueError, match=r"images \(0.png\) beside class folders"):
        opened(folder)


# Broken files


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.bmp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_truncated_file_is_skipped(folder, name, share):
    path = truncate(write_image(folder / "rose" / name), share)
    dataset = opened(folder, classes=3)
    assert len(dataset) == len(images_of(dataset)) == len(dataset.paths) == 9
    np.testing.assert_array_equal(dataset.labels, [0, 0, 0, 0, 1, 1, 1, 2, 2])
    ((skipped, reason),) = dataset.skipped
    assert skipped == path
    assert any(word in reason for word in ("truncated", "identify", "read", "decode", "Truncated"))
    with pytest.raises(ValueError, match=f"1 of 10 image files.*without `strict`.*{name}': "):
        opened(folder, strict=True)


def test_all_files_broken(tmp_path):
    for index in range(7):
        truncate(write_image(tmp_path / f"{index}.jpg"))
    with pytest.raises(
        ValueError, match="7 of 7 image files cannot be read.*0.jpg.*Truncated.*and 2 more$"
    ):
        opened(tmp_path)


def test_other_content_is_skipped(folder):
    (folder / "rose" / "page.jpg").write_text("<html>404</html>")
    Image.fromarray(photograph(0)).save(folder / "rose" / "really.gif")
    (folder / "rose" / "really.gif").rename(folder / "rose" / "really.jpg")
    assert [path.name for path, _ in opened(folder).skipped] == ["page.jpg", "really.jpg"]


def test_image_smaller_than_a_center_crop(folder):
    Image.fromarray(photograph(0, (15, 40))).save(folder / "rose" / "small.png")
    dataset = opened(folder, crop="center")
    assert len(dataset) == 9
    ((path, reason),) = dataset.skipped
    assert path.name == "small.png" and "15 x 40" in reason


def claim_size(path, side):
    """Writes a PNG whose header claims a size."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize("side", [10_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(folder, side):
    claim_size(folder / "rose" / "bomb.png", side)
    ((path, reason),) = opened(folder).skipped
    assert path.name == "bomb.png" and "decompression bomb" in reason


def test_file_that_breaks_after_the_opening(folder):
    dataset = opened(folder)
    truncate(folder / "rose" / "1.png")
    with pytest.raises(ValueError, match="rose.1.png' could be read when the source was opened"):
        images_of(dataset)


def test_decoding_ahead_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(data, "_DECODED_AHEAD", 2)
    dataset = opened(folder)
    decoded = []
    monkeypatch.setattr(data, "read_image", lambda path: decoded.append(path) or Image.open(path))
    batches = dataset.batches(1)
    next(batches)
    batches.close()
    # One handed out and two ahead.
    assert len(decoded) == 3
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


# Colour and orientation


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_exif_orientation(tmp_path, name):
    values = np.zeros((16, 32, 3), np.uint8)
    values[:, :16] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by 90 degrees clockwise: the left half comes to the top.
    Image.fromarray(values).save(tmp_path / name, exif=exif)
    (image,) = images_of(opened(tmp_path, crop="stretch"))
    assert image[:6].min() > 200 and image[10:].max() < 50


def colours(mode):
    if mode == "I;16":
        return Image.fromarray(np.full((20, 20), 120 * 257, np.uint16))
    image = Image.new("RGBA", (20, 20), (120, 120, 120, 255))
    if mode == "RGBA":
        return image
    return image.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "x.jpg"),
        ("CMYK", "x.jpg"),
        ("RGB", "x.jpg"),
        ("L", "x.png"),
        ("LA", "x.png"),
        ("P", "x.png"),
        ("RGBA", "x.png"),
        ("I;16", "x.png"),
        ("RGBA", "x.webp"),
        ("P", "x.bmp"),
    ],
)
def test_colour_modes(tmp_path, mode, name):
    colours(mode).save(tmp_path / name)
    (image,) = images_of(opened(tmp_path, strict=True))
    # JPEG, and the conversion to CMYK and back, round.
    assert image.shape == (16, 16, 3) and np.abs(image - 120).max() <= 2


def test_phone_photographs(tmp_path):
    Image.fromarray(photograph(0)).save(
        tmp_path / "x.jpg", "MPO", save_all=True, append_images=[Image.fromarray(photograph(1))]
    )
    assert Image.open(tmp_path / "x.jpg").format == "MPO"
    assert len(opened(tmp_path, strict=True)) == 1


# Lists


def write_list(folder, *lines):
    path = folder / "list.csv"
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    return path


def test_list_of_paths(folder):
    dataset = opened(write_list(folder, "path", "tulip/1.png", "daisy/0.png"))
    assert [path.parent.name for path in dataset.paths] == ["tulip", "daisy"]
    assert dataset.labels is None


def test_list_with_labels(folder):
    path = write_list(folder, "label,path", "2,tulip/1.png", "", "0,daisy/0.png")
    np.testing.assert_array_equal(opened(path, classes=3).labels, [2, 0])
    labels = Labels(names=FLOWERS, ids=("n0", "n1", "n2"))
    np.testing.assert_array_equal(opened(path, labels=labels).labels, [2, 0])
    path = write_list(folder, "path,label", "tulip/1.png,n2", "daisy/0.png,Daisy", "rose/0.png,n1")
    np.testing.assert_array_equal(opened(path, labels=labels).labels, [2, 0, 1])
    digits = Labels(names=("1", "0"))
    path = write_list(folder, "path,label", "tulip/1.png,1", "daisy/0.png,0")
    np.testing.assert_array_equal(opened(path, labels=digits).labels, [0, 1])


def test_list_with_a_missing_file(folder):
    path = write_list(folder, "path", "tulip/1.png", "tulip/9.png")
    dataset = opened(path)
    assert len(dataset) == 1
    assert dataset.skipped[0].path == folder / "tulip" / "9.png"
    assert "No such file" in dataset.skipped[0].reason


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["tulip/1.png,2"], r"first line must be the header.*\['tulip/1.png', '2'\]"),
        (["path,label"], "holds no images"),
        (["path,label", "tulip/1.png,2", "rose/1.png,"], "Lines without a label: 3"),
        (["path,label", ",2"], "Lines without a path: 2"),
        (["path,label", "tulip/1.png,2", "rose/1.png,rose"], "need the model's labels file.*rose$"),
        (["path,label", "a,b.png,2"], "Line 2 has 3 values"),
    ],
)
def test_bad_lists(folder, lines, message):
    with pytest.raises(ValueError, match=f"Image list .*list.csv.*{message}"):
        opened(write_list(folder, *lines))


def test_list_with_unknown_labels(folder):
    path = write_list(folder, "path,label", "tulip/1.png,tulips", "rose/1.png,rose")
    with pytest.raises(ValueError, match=r"Labels that are no .*'tulips' \(closest: tulip\)"):
        opened(path, labels=Labels(FLOWERS))
    path = write_list(folder, "path,label", "tulip/1.png,3")
    with pytest.raises(ValueError, match=r"Labels must be in 0..2. Received: labels in 3..3"):
        opened(path, classes=3)


# Arrays


@pytest.fixture
def images():
    return np.stack([photograph(seed, SIZE) for seed in range(6)])


def test_arrays(images):
    dataset = opened(images)
    assert len(dataset) == 6 and dataset.paths is None and dataset.labels is None
    np.testing.assert_array_equal(images_of(dataset), images)
    dataset = opened((images.astype(np.float64), [0, 1, 2, 0, 1, 2]), classes=3)
    assert dataset.labels.dtype == np.int64
    assert [images.dtype for images, _ in dataset.batches(6)] == [np.float32]
    grey = opened(images[..., :1], in_graph_preprocessing=False)
    np.testing.assert_array_equal(images_of(grey), preprocess(images[..., :1], SPEC))


def test_values_in_the_scale_of_the_model(images):
    transformed = preprocess(images, SPEC)
    dataset = opened(transformed, preprocessing=None)
    np.testing.assert_array_equal(images_of(dataset), transformed)


def test_npz(images, tmp_path):
    np.savez(tmp_path / "a.npz", images=images)
    assert opened(tmp_path / "a.npz").labels is None
    np.savez_compressed(tmp_path / "b.npz", images=images, labels=np.arange(6, dtype=np.uint8))
    dataset = opened(str(tmp_path / "b.npz"))
    np.testing.assert_array_equal(images_of(dataset), images)
    np.testing.assert_array_equal(dataset.labels, range(6))


def test_bad_npz(images, tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match="no image source.*a.npz"):
        opened(path)
    np.savez(path, x=images)
    with pytest.raises(ValueError, match=r"a.npz' is no .npz file.*no `images`.*\['x'\]"):
        opened(path)
    np.savez(path, images=images, labels=np.asarray([None] * 6))
    with pytest.raises(ValueError, match="a.npz' is no .npz file.*allow_pickle"):
        opened(path)
    np.savez(path, images=images)
    truncate(path)
    with pytest.raises(ValueError, match="a.npz' is no .npz file"):
        opened(path)


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (lambda x: x / np.float32(255), "0..1"),
        (lambda x: x / np.float32(127.5) - 1, "-1..1"),
        (lambda x: preprocess(x, SPEC), "-2.1179.*..2.64"),
        (lambda x: x // 16, "0..15"),
        (lambda x: x.astype(np.uint16) * 257, "0..65535"),
        (lambda x: x.astype(np.int16) - 128, "-128..127"),
    ],
)
def test_arrays_of_another_range(images, change, received):
    with pytest.raises(
        ValueError, match=f"pixels in 0..255.*preprocessing=None. Received: values in {received}"
    ):
        opened(change(images))


def test_floats_may_overshoot(images):
    assert len(opened(images * 1.2 - 20)) == 6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_arrays_that_are_not_finite(images, value):
    images = images.astype(np.float32)
    images[3, 2, 1, 0] = value
    for spec in (SPEC, None):
        with pytest.raises(ValueError, match="must be finite"):
            opened(images, preprocessing=spec)


def test_bad_arrays(images):
    with pytest.raises(
        ValueError, match=r"\(16, 16, 'channels'\).*resize them first.*\(8, 16, 3\)"
    ):
        opened(images[:, :8])
    with pytest.raises(ValueError, match=r"Received: images of shape \(6, 16, 16\)"):
        opened(images[..., 0])
    with pytest.raises(ValueError, match="no images. Received: an array of length 0"):
        opened(images[:0])
    with pytest.raises(TypeError, match="integers or floats. Received: dtype bool"):
        opened(images > 3)
    with pytest.raises(TypeError, match="a path, an array of images.*Received: list"):
        opened([1, 2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(5), r"shape \(6,\).*Received: shape \(5,\)"),
        (np.eye(6, dtype=int), r"argmax. Received: shape \(6, 6\)"),
        (np.arange(6.0), "Received: .*float64"),
        (np.arange(6), r"in 0..4. Received: labels in 0..5"),
        (np.arange(6) - 1, r"in 0..4. Received: labels in -1..4"),
    ],
)
def test_bad_array_labels(images, labels, message):
    with pytest.raises(ValueError, match=f"Labels .*{message}"):
        opened((images, labels), classes=5)


def test_negative_labels_without_classes(images):
    with pytest.raises(ValueError, match="must be at least 0. Received: labels in -1..4"):
        opened((images, np.arange(6) - 1))


# tf.data


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("labelled", [False, True])
def test_tensorflow_dataset(tf, images, batch_size, labelled):
    labels = np.asarray([2, 0, 1, 2, 0, 1])
    source = tf.data.Dataset.from_tensor_slices((images, labels) if labelled else images)
    if batch_size is not None:
        source = source.batch(batch_size)
    dataset = opened(source, classes=3)
    assert len(dataset) == 6
    for _ in range(2):
        np.testing.assert_array_equal(images_of(dataset, 5), images)
    if labelled:
        np.testing.assert_array_equal(dataset.labels, labels)
    else:
        assert dataset.labels is None
    sample = opened(source, samples=3)
    chosen = [
        index for index in range(6) if (images[index] == images_of(sample)).all((1, 2, 3)).any()
    ]
    assert len(chosen) == 3
    np.testing.assert_array_equal(images_of(sample), images[chosen])
    if labelled:
        assert sorted(sample.labels) == [0, 1, 2]
        np.testing.assert_array_equal(sample.labels, labels[chosen])


def test_tensorflow_dataset_that_changes(tf, images):
    source = tf.data.Dataset.from_tensor_slices((images, np.arange(6)))
    dataset = opened(source.shuffle(6, seed=1, reshuffle_each_iteration=True))
    with pytest.raises(ValueError, match="another order.*without shuffling"):
        for _ in range(3):
            images_of(dataset)
    lengths = iter((6, 5, 7))

    def generate():
        yield from (images[index % 6] for index in range(next(lengths)))

    spec = tf.TensorSpec((*SIZE, 3), tf.uint8)
    dataset = opened(tf.data.Dataset.from_generator(generate, output_signature=spec))
    for _ in range(2):
        with pytest.raises(ValueError, match="other images"):
            images_of(dataset)


def test_bad_tensorflow_datasets(tf, images):
    source = tf.data.Dataset.from_tensor_slices(images)
    with pytest.raises(ValueError, match="repeats without end.*take"):
        opened(source.repeat())
    with pytest.raises(ValueError, match="no images. Received: an empty dataset"):
        opened(source.take(0))
    with pytest.raises(ValueError, match=r"Received: images of shape \(8, 16, 3\)"):
        opened(source.map(lambda image: image[:8]))
    with pytest.raises(ValueError, match="batched or not.*Received: "):
        opened(source.batch(2).batch(2))
    with pytest.raises(ValueError, match="batched or not.*Received: "):
        opened(source.map(lambda image: {"image": image}))
    with pytest.raises(TypeError, match="integers or floats.*tf.string"):
        opened(source.map(tf.strings.as_string))
    with pytest.raises(ValueError, match="pixels in 0..255.*0..1$"):
        opened(source.map(lambda image: tf.cast(image, tf.float32) / 255))
    with pytest.raises(ValueError, match=r"argmax. Received: shape \(6, 3\)"):
        opened(source.map(lambda image: (image, tf.one_hot(1, 3))))


# Samples


def test_samples_are_balanced_and_repeatable(folder):
    dataset = opened(folder, samples=5)
    assert len(dataset) == 5
    assert sorted(np.bincount(dataset.labels)) == [1, 2, 2]
    assert list(dataset.paths) == sorted(dataset.paths)
    assert opened(folder, samples=5).paths == dataset.paths
    assert len({opened(folder, samples=5, seed=seed).paths for seed in range(8)}) > 1
    np.testing.assert_array_equal(np.bincount(opened(folder, samples=6).labels), [2, 2, 2])
    np.testing.assert_array_equal(np.bincount(opened(folder, samples=8).labels), [3, 3, 2])


def test_fewer_samples_than_classes(folder):
    drawn = [tuple(opened(folder, samples=2, seed=seed).labels) for seed in range(20)]
    assert set(drawn) == {(0, 1), (0, 2), (1, 2)}


def test_samples_of_unlabelled_images(images):
    dataset = opened(images, samples=4)
    assert len(dataset) == len(images_of(dataset)) == 4
    np.testing.assert_array_equal(images_of(opened(images, samples=4)), images_of(dataset))


def test_excluded_files_are_left_out_before_any_is_drawn(folder):
    everything = opened(folder).paths
    excluded = [everything[0].parent / ".." / path.parent.name / path.name for path in everything]
    left = opened(folder, exclude=excluded[1:6:2])
    assert left.paths == tuple(everything[i] for i in (0, 2, 4, 6, 7, 8))
    assert len(left.labels) == len(left) == len(images_of(left)) == 6
    drawn = opened(folder, exclude=excluded[1:6:2], samples=6)
    assert drawn.paths == left.paths
    with pytest.raises(ValueError, match="All 9 images of .* are excluded"):
        opened(folder, exclude=excluded)
    arrays = np.random.default_rng(0).integers(0, 256, (4, *left.size, 3), np.uint8)
    assert len(opened(arrays, exclude=excluded)) == 4


def test_more_samples_than_images(folder):
    assert len(opened(folder, samples=100)) == 9


def test_another_image_is_drawn_for_a_broken_one(folder):
    for path in folder.glob("daisy/*.png"):
        if path.name != "0.png":
            truncate(path)
    dataset = opened(folder, samples=6)
    np.testing.assert_array_equal(np.bincount(dataset.labels), [1, 3, 2])
    assert {path.parent.name for path, _ in dataset.skipped} == {"daisy"}


# Arguments


def test_bad_arguments(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no image source.*nowhere"):
        opened(tmp_path / "nowhere")
    (tmp_path / "x.tiff").write_bytes(b"x")
    with pytest.raises(ValueError, match="a .csv list, a .npz file or an image.*x.tiff"):
        opened(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="Image files are cropped.*preprocessing=None"):
        opened(folder, preprocessing=None)
    with pytest.raises(ValueError, match="in_graph_preprocessing=False` needs"):
        opened(folder, preprocessing=None, in_graph_preprocessing=False)
    with pytest.raises(ValueError, match="crop.*Received: crop='middle'"):
        opened(folder, crop="middle")
    with pytest.raises(ValueError, match="size.*Received: size=16"):
        open_images(folder, 16, preprocessing=SPEC)
    for argument in ("samples", "classes"):
        with pytest.raises(ValueError, match=f"{argument}` must be a positive integer.*=0"):
            opened(folder, **{argument: 0})
    with pytest.raises(ValueError, match="batch_size` must be a positive integer.*=0"):
        opened(folder).batches(0)


# Real photographs


@pytest.mark.slow
def test_real_photographs():
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"The photographs are missing: {SHARED}")
        pytest.skip(f"needs the photographs in {SHARED}")
    spec = get_spec("EfficientNetV2B0").preprocessing
    labels = read_labels(SHARED / "imagenet-sample" / "classes.csv")
    assert len(labels) == 1000 and labels.find("n01440764") == labels.find("tench") == 0
    parts = [
        open_images(
            SHARED / "imagenet-sample" / part,
            (224, 224),
            preprocessing=spec,
            labels=labels,
            classes=1000,
            strict=True,
        )
        for part in ("calibration", "evaluation")
    ]
    for dataset in parts:
        assert len(dataset) == len(set(dataset.labels)) == 200
        assert [labels.find(path.parent.name) for path in dataset.paths] == list(dataset.labels)
    assert set(parts[0].labels) != set(parts[1].labels)
    shapes = [images.shape for images, _ in parts[1].batches(64)]
    assert shapes == [(64, 224, 224, 3)] * 3 + [(8, 224, 224, 3)]

    flowers = open_images(
        SHARED / "flowers" / "evaluation",
        (224, 224),
        preprocessing=spec,
        classes=5,
        crop="center",
        samples=50,
        strict=True,
    )
    np.testing.assert_array_equal(np.bincount(flowers.labels), [10] * 5)
    # Photographs of this kind are neither dark nor bright on average.
    assert 60 < images_of(flowers, 10).mean() < 160
