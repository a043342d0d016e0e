import numpy as np
import pytest
import toy
from PIL import Image

from keras_effnet.data import open_images
from keras_effnet.specs import PreprocessingSpec
from keras_effnet.training import (
    AugmentationConfig,
    EvaluationBatches,
    Images,
    Phase,
    TrainingBatches,
    TrainingConfig,
    balanced_weights,
)

PREPROCESSING = PreprocessingSpec(crop_padding=0)
STILL = AugmentationConfig(min_area=1, flip=False)


def config_of(**values):
    values = {"batch_size": 8} | values
    return TrainingConfig((Phase("all", 1, 1e-3),), **values)


def epoch_of(images, config, phase=0, epoch=0, unreadable=None, **arguments):
    batches = TrainingBatches(images, config, {} if unreadable is None else unreadable)
    return list(batches.epoch(phase, epoch, **arguments))


def assert_equal(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        for part, twin in zip(batch, other, strict=True):
            np.testing.assert_array_equal(part, twin)


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, colour in zip("abc", toy.COLOURS, strict=True):
        (tmp_path / name).mkdir()
        for index in range(4):
            pixels = np.clip(random.normal(colour, 25, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path


def images_of(folder):
    return Images(open_images(folder, toy.SIZE, preprocessing=PREPROCESSING), 3, PREPROCESSING)


RANDOM = AugmentationConfig(rand_augment=2, mixup=0.2, cutmix=1.0)


def test_a_batch_depends_on_seed_phase_epoch_and_step_alone():
    images, config = toy.colour_images(), config_of(augmentation=RANDOM)
    whole = epoch_of(images, config)
    assert len(whole) == 4
    assert_equal(whole, epoch_of(images, config))
    assert_equal(whole[2:], epoch_of(images, config, first_step=2))
    for other in (
        epoch_of(images, config, epoch=1),
        epoch_of(images, config, phase=1),
        epoch_of(images, config_of(augmentation=RANDOM, seed=1)),
    ):
        assert np.any(whole[0].images != other[0].images)


def test_processes_make_their_rows_of_the_same_batch():
    images, config = toy.colour_images(), config_of(augmentation=RANDOM, class_weights="balanced")
    whole = epoch_of(images, config)
    halves = [epoch_of(images, config, rows=rows) for rows in (slice(0, 4), slice(4, 8))]
    joined = [
        type(one)(*map(np.concatenate, zip(one, other, strict=True)))
        for one, other in zip(*halves, strict=True)
    ]
    assert_equal(whole, joined)


def test_an_epoch_shows_every_image_once_but_for_an_unfilled_batch():
    images = toy.colour_images(20)
    batches = epoch_of(images, config_of(augmentation=STILL))
    shown = np.concatenate([batch.images for batch in batches])
    assert shown.shape == (16, 16, 16, 3) and shown.dtype == np.float32
    assert len({image.tobytes() for image in shown}) == 16
    arrays = zip(*toy.colour_arrays(20), strict=True)
    known = {image.tobytes(): label for image, label in arrays}
    targets = np.concatenate([batch.targets for batch in batches])
    labels = [known.get(image.tobytes()) for image in shown]
    assert labels == targets.argmax(axis=1).tolist()
    assert all(np.all(batch.weights == 1) for batch in batches)


def test_an_image_that_cannot_be_read_in_mid_epoch_is_named_skipped_and_has_no_weight(folder):
    images, unreadable, told = images_of(folder), {}, []
    (folder / "b" / "2.png").write_bytes(b"no image")
    config = config_of(batch_size=4, augmentation=STILL)
    batches = TrainingBatches(images, config, unreadable, lambda *skipped: told.append(skipped))
    found = [batch for epoch in range(2) for batch in batches.epoch(0, epoch)]
    assert list(unreadable) == [str(folder / "b" / "2.png")]
    assert "cannot identify" in unreadable[str(folder / "b" / "2.png")]
    assert len(told) == 1
    weights = np.concatenate([batch.weights for batch in found])
    # Once in each of the two epochs.
    assert weights.tolist().count(0) == 2 and len(weights) == 24


def test_strict_makes_it_an_error_and_so_does_a_lost_disk(folder):
    images = images_of(folder)
    (folder / "b" / "2.png").unlink()
    with pytest.raises(ValueError, match="2.png' cannot be read: .*Repair or remove it"):
        epoch_of(images, config_of(strict=True, batch_size=4))
    for path in folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="None of the 8 images of a batch can be read"):
        epoch_of(images, config_of())


def test_balanced_weights_are_inverse_to_the_counts_and_one_on_the_mean():
    pixels, _ = toy.colour_arrays(12)
    labels = np.array([0] * 8 + [2] * 4)
    dataset = open_images((pixels, labels), toy.SIZE, preprocessing=PREPROCESSING)
    images = Images(dataset, 3, PREPROCESSING)
    weights = balanced_weights(images)
    np.testing.assert_allclose(weights, [0.75, 0, 1.5])
    np.testing.assert_allclose(weights[labels].mean(), 1)
    batch = epoch_of(images, config_of(class_weights="balanced", augmentation=STILL))[0]
    np.testing.assert_allclose(batch.weights, weights[batch.targets.argmax(axis=1)])


def test_a_split_is_stratified_seeded_and_without_overlap():
    images = toy.colour_images(30)
    first, second = images.split(0.2, seed=3)
    assert np.bincount(second.labels).tolist() == [2, 2, 2]
    assert sorted([*first.indices, *second.indices]) == list(range(30))
    again = images.split(0.2, seed=3)[1]
    np.testing.assert_array_equal(second.indices, again.indices)
    assert np.any(second.indices != images.split(0.2, seed=4)[1].indices)


def test_evaluation_shows_every_image_once_with_a_filled_up_last_batch():
    images = toy.colour_images(10)
    batches = list(EvaluationBatches(images, 4).batches())
    assert [batch.weights.sum() for batch in batches] == [4, 4, 2]
    used = np.concatenate([batch.images[batch.weights > 0] for batch in batches])
    np.testing.assert_array_equal(used, toy.colour_arrays(10)[0])


def test_a_transform_is_applied_outside_the_model():
    spec = PreprocessingSpec(crop_padding=0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5))
    dataset = open_images(toy.colour_arrays(8), toy.SIZE, preprocessing=spec)
    batch = next(EvaluationBatches(Images(dataset, 3, spec, transform=spec), 8).batches())
    assert batch.images.min() == -2 and batch.images.max() == 2


def test_refusals(folder):
    pixels, _ = toy.colour_arrays(8)
    unlabelled = open_images(pixels, toy.SIZE, preprocessing=PREPROCESSING)
    with pytest.raises(ValueError, match="Training needs labelled images"):
        Images(unlabelled, 3, PREPROCESSING)
    with pytest.raises(ValueError, match="A batch holds 8 images, but there are only 6"):
        TrainingBatches(toy.colour_images(6), config_of(), {})
    with pytest.raises(ValueError, match="`share` must be between 0 and 1. Received: 1"):
        toy.colour_images().split(1, 0)
    with pytest.raises(ValueError, match="No class has two images"):
        toy.colour_images(3).split(0.5, 0)
    images = images_of(folder)
    (folder / "a" / "0.png").unlink()
    with pytest.raises(ValueError, match="validation image .*0.png' could be read when"):
        list(EvaluationBatches(images, 4).batches())
