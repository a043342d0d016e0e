"""The same as `keras-effnet scale`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["scale", *sys.argv[1:]]))
