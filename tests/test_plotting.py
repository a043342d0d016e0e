import io
import math
import sys

import numpy as np
import pytest
from PIL import Image

from keras_effnet import plotting
from keras_effnet.scaling import COMPOUND, DEPTH_ONLY, resolve
from keras_effnet.specs import SPECS

B0 = SPECS["EfficientNetB0"]


def curves(axes):
    """Points of every labelled line of a panel."""
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


@pytest.fixture(scope="module")
def family():
    return plotting.draw_family()


def test_curves_are_those_of_the_plans(family):
    multiply_adds, parameters = (curves(axes) for axes in family.axes)
    for label, scaling in (("compound (1.2, 1.1, 1.15)", COMPOUND), ("depth only", DEPTH_ONLY)):
        for phi in (0, 1, 4.5, 6):
            plan = resolve(scaling.scale(B0, phi))
            for points, value in (
                (multiply_adds[label], plan.multiply_adds / 1e9),
                (parameters[label], plan.parameters / 1e6),
            ):
                nearest = points[np.abs(points[:, 0] - phi).argmin()]
                np.testing.assert_allclose(nearest, (phi, value), rtol=1e-9, atol=1e-9)


def test_resolution_alone_adds_no_parameters(family):
    values = curves(family.axes[1])["resolution only"][:, 1]
    assert values.min() == values.max() == resolve(B0).parameters / 1e6


def test_official_models_stand_at_their_nominal_phi(family):
    for axes, count in zip(family.axes, ("multiply_adds", "parameters"), strict=True):
        points = curves(axes)["official B0 to B7"]
        unit = 1e9 if count == "multiply_adds" else 1e6
        assert [tuple(point) for point in points] == [
            (phi, getattr(resolve(name), count) / unit)
            for name, phi in plotting.NOMINAL_PHI.items()
        ]
        names = [text.get_text() for text in axes.texts]
        assert names == [f"B{i}" for i in range(8)]


def test_the_nominal_phi_is_near_that_of_the_coefficients():
    # Within 1.3 on every axis that was scaled; the authors rounded by hand.
    for name, nominal in plotting.NOMINAL_PHI.items():
        phis = COMPOUND.phi_of(SPECS[name], B0)
        assert all(math.isclose(phi, nominal, abs_tol=1.3) for phi in phis.values()), name


def test_png_is_a_picture_and_does_not_change(family):
    data = plotting.png(family)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG" and picture.size == (1650, 780)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert plotting.png(plotting.draw_family()) == data


def test_predictions_show_image_title_and_verdict():
    images = np.stack([np.full((8, 8, 3), value, np.float32) for value in (0, 128, 300)])
    figure = plotting.draw_predictions(
        images, ["3", "4, is 9", "5"], [True, False, True], columns=2
    )
    assert len(figure.axes) == 4
    shown = figure.axes[:3]
    assert [axes.get_title() for axes in shown] == ["3", "4, is 9", "5"]
    # 300 is clipped to white.
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in shown] == [0, 128, 255]
    colors = [axes.spines["left"].get_edgecolor() for axes in shown]
    assert colors[0] == colors[2] != colors[1]
    assert not figure.axes[3].axison


@pytest.mark.parametrize(
    ("images", "titles", "right"),
    [(0, [], []), (2, ["a"], [True, True]), (2, ["a", "b"], [True])],
)
def test_predictions_refuse_lists_of_other_lengths(images, titles, right):
    with pytest.raises(ValueError, match="One title and one verdict.*Received: "):
        plotting.draw_predictions(np.zeros((images, 4, 4, 3)), titles, right)


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "keras-effnet\[plot\]"'):
        plotting.draw_family()


def test_drawing_leaves_the_global_state_of_matplotlib_alone():
    from matplotlib import pyplot, rcParams

    before = dict(rcParams)
    plotting.png(plotting.draw_predictions(np.zeros((1, 8, 8, 3)), ["0"], [True]))
    assert dict(rcParams) == before
    assert pyplot.get_fignums() == []
