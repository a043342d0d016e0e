import numpy as np
import pytest
from PIL import Image

from keras_effnet.preprocessing import crop_and_resize
from keras_effnet.specs import PreprocessingSpec
from keras_effnet.training import OPERATIONS, AugmentationConfig, Mix, rand_augment, vary
from keras_effnet.training.augmentation import apply

SPEC = PreprocessingSpec(crop_padding=0)
WITHOUT_STRENGTH = ("auto_contrast", "equalize")


def random_pixels(shape=(20, 24, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def image():
    return Image.fromarray(random_pixels())


def draw(image, config, *seed):
    return vary(image, (16, 16), SPEC, config, np.random.default_rng(seed))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_of_no_strength_changes_nothing(image, operation):
    changed = np.asarray(apply(operation, image, 0.0, 1))
    if operation not in WITHOUT_STRENGTH:
        # Pillow reads the affine transforms and enhancements of no strength back exactly.
        np.testing.assert_array_equal(changed, np.asarray(image))
    assert changed.shape == (20, 24, 3) and changed.dtype == np.uint8


@pytest.mark.parametrize("operation", sorted({*OPERATIONS} - {"identity", *WITHOUT_STRENGTH}))
def test_a_strong_operation_changes_the_image(image, operation):
    assert np.any(np.asarray(apply(operation, image, 0.9, 1)) != np.asarray(image))


@pytest.mark.parametrize("operation", ["rotate", "shear_x", "translate_y", "brightness"])
def test_the_sign_is_a_direction(image, operation):
    one, other = (np.asarray(apply(operation, image, 0.5, sign)) for sign in (1, -1))
    assert np.any(one != other)


def test_translation_moves_by_the_share_of_the_width_and_shows_grey():
    row = np.tile(np.arange(20, dtype=np.uint8)[None, :, None] * 10, (4, 1, 3))
    moved = np.asarray(apply("translate_x", Image.fromarray(row), 1.0, 1))
    # 0.45 of 20 pixels, to the left.
    np.testing.assert_array_equal(moved[:, :10, 0], row[:, 9:19, 0])
    assert np.all(moved[:, 12:] == 128)


def test_posterize_keeps_four_bits_and_solarize_inverts_all_at_full_strength(image):
    pixels = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(apply("posterize", image, 1.0, 1)), pixels & 0xF0)
    np.testing.assert_array_equal(np.asarray(apply("solarize", image, 1.0, 1)), 255 - pixels)


def test_rand_augment_draws_for_each_image_alone(image):
    results = {
        np.asarray(rand_augment(image, 2, 9, np.random.default_rng(seed))).tobytes()
        for seed in range(12)
    }
    assert len(results) > 8


def test_an_image_is_a_function_of_its_generator(image):
    config = AugmentationConfig(rand_augment=2)
    np.testing.assert_array_equal(draw(image, config, 1, 2), draw(image, config, 1, 2))
    assert np.any(draw(image, config, 1, 2) != draw(image, config, 1, 3))


def test_without_a_random_crop_it_is_that_of_the_evaluation(image):
    still = AugmentationConfig(min_area=1, flip=False)
    random = np.random.default_rng(0)
    for crop in ("published", "center", "stretch"):
        found = vary(image, (16, 16), SPEC, still, random, crop)
        np.testing.assert_array_equal(found, crop_and_resize(image, (16, 16), SPEC, crop))
    assert np.any(found != vary(image, (16, 16), SPEC, still, random))


def test_a_flip_mirrors(image):
    seen = {draw(image, AugmentationConfig(min_area=1), seed).tobytes() for seed in range(20)}
    plain = draw(image, AugmentationConfig(min_area=1, flip=False), 0)
    assert seen == {plain.tobytes(), plain[:, ::-1].tobytes()}


def test_a_crop_keeps_at_least_its_area():
    # The value of a pixel is its row, so the result tells what part was cropped.
    rows = np.repeat(np.arange(200, dtype=np.uint8)[:, None, None], 200, axis=1).repeat(3, axis=2)
    heights = []
    for seed in range(30):
        crop = draw(Image.fromarray(rows), AugmentationConfig(min_area=0.5, flip=False), seed)
        heights.append((float(crop.max()) - float(crop.min())) / 200)
    # Half of the area in the flattest proportions has 0.61 of the height, less half a result's row.
    assert 0.5 < min(heights) < 0.85 < max(heights) <= 1


def mix_of(seed=0, **config):
    return Mix(AugmentationConfig(**config), (16, 16), 6, np.random.default_rng(seed))


def test_mixup_mixes_images_and_targets_by_the_same_share():
    mix = mix_of(mixup=1.0)
    own = np.arange(6, dtype=np.float32)[:, None, None, None] * np.ones((6, 16, 16, 3), np.float32)
    targets = np.eye(6, dtype=np.float32)
    images = mix.images(own, own[mix.partners])
    expected = mix.share * np.arange(6) + (1 - mix.share) * mix.partners
    np.testing.assert_allclose(images[:, 0, 0, 0], expected, rtol=1e-5)
    mixed = mix.targets(targets, targets[mix.partners])
    np.testing.assert_allclose(mixed.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(mixed @ np.arange(6), expected, rtol=1e-5)


def test_cutmix_gives_each_target_the_share_of_its_pixels():
    shares = []
    for seed in range(20):
        mix = mix_of(seed, cutmix=1.0)
        zeros, ones = np.zeros((6, 16, 16, 3), np.float32), np.ones((6, 16, 16, 3), np.float32)
        images = mix.images(zeros, ones)
        assert set(np.unique(images)) <= {0.0, 1.0}
        assert np.all(zeros == 0)
        np.testing.assert_allclose(1 - mix.share, images.mean(), atol=1e-6)
        shares.append(mix.share)
    assert 0.1 < np.mean(shares) < 0.9


def test_both_take_turns_and_neither_leaves_the_batch_alone():
    kinds = {mix_of(seed, mixup=0.2, cutmix=1.0).box is None for seed in range(20)}
    assert kinds == {True, False}
    assert mix_of().partners is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_area": 0}, "`min_area` must be above 0"),
        ({"rand_augment": -1}, "`rand_augment` must be at least 0"),
        ({"magnitude": 11}, r"`magnitude` must be in 0..10. Received: 11"),
        ({"mixup": -0.1}, "`mixup` must be at least 0"),
        ({"cutmix": float("inf")}, "`cutmix`"),
    ],
)
def test_configs_refuse_what_is_not_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**values)
