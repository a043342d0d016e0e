"""The same as `keras-effnet convert-weights`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["convert-weights", *sys.argv[1:]]))
