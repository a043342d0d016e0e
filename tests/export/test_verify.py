import numpy as np
import pytest

from keras_effnet.export import TFLiteRunner, compare
from keras_effnet.export.verify import Scores, Thresholds, score, worst_images

REFERENCE = np.float32([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.4, 0.3, 0.3]])


def test_scores_by_hand():
    outputs = REFERENCE.copy()
    outputs[0] = [0.3, 0.5, 0.2]
    scores = score("m", outputs, REFERENCE, np.array([1, 1, 2, 2]))
    assert scores.images == 4
    assert scores.agreement == 3 / 4
    assert scores.top1 == 3 / 4
    assert scores.top5 is None
    # Two of twelve outputs are off by 0.2.
    assert scores.mean_abs_difference == pytest.approx(0.4 / 12)
    assert scores.max_abs_difference == pytest.approx(0.2)
    signal = np.square(REFERENCE.astype(np.float64)).sum()
    assert scores.sqnr_db == pytest.approx(10 * np.log10(signal / 0.08))


def test_equal_outputs_have_no_noise_to_compare_with():
    scores = score("m", REFERENCE, REFERENCE)
    assert scores.agreement == 1
    assert scores.max_abs_difference == 0
    assert scores.sqnr_db is None
    assert scores.top1 is None


def test_top5_counts_the_first_five():
    outputs = np.float32([[0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]] * 7)
    scores = score("m", outputs, outputs, np.arange(7))
    assert scores.top1 == 1 / 7
    assert scores.top5 == 5 / 7


def test_ties_go_to_the_lower_index_as_in_argmax():
    """Integer files give many equal probabilities; counting all of them first would flatter."""
    outputs = np.full((7, 7), 0.14, np.float32)
    scores = score("m", outputs, outputs, np.arange(7))
    assert scores.top1 == 1 / 7
    assert scores.top5 == 5 / 7


def test_compares_batch_by_batch_with_the_first():
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1)

    def one_hot(classes):
        return lambda batch: np.eye(3, dtype=np.float32)[classes[batch.ravel().astype(int)]]

    truth = np.array([0, 1, 2, 0, 1])
    models = {"right": one_hot(truth), "wrong twice": one_hot(np.array([0, 1, 1, 0, 0]))}
    batches = [(images[:3], truth[:3]), (images[3:], truth[3:])]
    right, wrong = compare(models, iter(batches))
    assert (right.name, right.top1, right.agreement, right.images) == ("right", 1, 1, 5)
    assert (wrong.name, wrong.top1, wrong.agreement) == ("wrong twice", 3 / 5, 3 / 5)


def test_sees_that_an_exported_file_agrees_and_a_shifted_one_does_not(model, images, int8_bytes):
    runner = TFLiteRunner(int8_bytes)
    predictors = {
        "keras": model.predict_on_batch,
        "file": runner.predict,
        "broken": lambda batch: np.roll(runner.predict(batch), 1, axis=1),
    }
    _, file, broken = compare(predictors, [(images, None)])
    assert file.agreement > 0.8
    assert file.sqnr_db > 10
    assert broken.agreement < 0.3
    assert broken.sqnr_db < 0


@pytest.mark.parametrize(
    ("predictors", "batches", "message"),
    [
        ({}, [(REFERENCE, None)], "at least one model"),
        ({"m": lambda x: x}, [], "no images"),
        ({"m": lambda x: x}, [(REFERENCE, None), (REFERENCE, np.zeros(4, int))], "has labels or"),
        ({"m": lambda x: x[:1]}, [(REFERENCE, None)], r"'m' must give.*\(4, classes\)"),
        ({"m": lambda x: x * np.nan}, [(REFERENCE, None)], "'m' gives outputs.*not finite"),
        ({"m": lambda x: x}, [(REFERENCE, np.full(4, 3))], r"in 0..2. Received: labels in 3..3"),
        (
            {"m": lambda x: x, "n": lambda x: x[:, :2]},
            [(REFERENCE, None)],
            r"'n' must have the shape.*\(4, 3\). Received: \(4, 2\)",
        ),
    ],
)
def test_refuses(predictors, batches, message):
    with pytest.raises(ValueError, match=message):
        compare(predictors, batches)


def scores_of(name, **changes):
    fields = {"images": 4, "top1": 0.75, "top5": None, "agreement": 0.9, "sqnr_db": 20.0}
    fields |= {"mean_abs_difference": 0.1, "max_abs_difference": 0.2} | changes
    return Scores(name=name, **fields)


@pytest.mark.parametrize(
    ("thresholds", "failure"),
    [
        ({"min_agreement": 0.9}, None),
        ({"min_agreement": 0.901}, "agreement 90.00% is below 90.10%"),
        ({"min_sqnr": 20.0}, None),
        ({"min_sqnr": 20.5}, "SQNR 20.0 dB is below 20.5 dB"),
        ({"min_top1": 0.75}, None),
        ({"min_top1": 0.8}, "top-1 75.00% is below 80.00%"),
        ({"max_top1_loss": 0.1}, None),
        ({"max_top1_loss": 0.05}, "top-1 is 10.00% lower, more than 5.00%"),
    ],
)
def test_thresholds_hold_at_their_value_and_fail_beyond(thresholds, failure):
    reference, file = scores_of("Keras model", top1=0.85), scores_of("file")
    found = Thresholds(**thresholds).failures(file, reference)
    assert found == (() if failure is None else (failure,))


def test_thresholds_without_noise_or_labels():
    exact = scores_of("file", sqnr_db=None, top1=None)
    assert Thresholds(min_sqnr=60.0).failures(exact, exact) == ()
    with pytest.raises(ValueError, match="need labelled images"):
        Thresholds(min_top1=0.5).failures(exact, exact)
    with pytest.raises(ValueError, match="`min_agreement` must be a share in 0..1. Received: 95"):
        Thresholds(min_agreement=95)
    assert not Thresholds().any and Thresholds(max_top1_loss=0.0).any


def test_worst_images_begin_with_another_choice():
    outputs = REFERENCE.copy()
    outputs[1] = [0.5, 0.5, 0.0]  # A tie goes to the lower class.
    outputs[2] = [0.1, 0.1, 0.8]  # The same choice.
    outputs[3] = [0.41, 0.3, 0.29]
    worst = worst_images(outputs, REFERENCE, np.array([0, 1, 2, 0]), 3)
    assert [image.index for image in worst] == [1, 2, 3]  # The first one does not differ.
    first = worst[0]
    assert (first.label, first.expected, first.found) == (1, 1, 0)
    assert first.expected_score == pytest.approx(0.8)
    assert first.found_score == pytest.approx(0.5)
    assert first.distance == pytest.approx(np.sqrt(0.16 + 0.09 + 0.01))
    assert worst_images(REFERENCE, REFERENCE, None, 3) == ()
