"""What the tests of the commands share."""

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (220, 30, 40), "green": (30, 200, 60), "blue": (40, 60, 230)}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Four images of each colour, larger than the model's input."""
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for index in range(4):
            pixels = np.clip(random.normal(colour, 25, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.jpg")
    return root
