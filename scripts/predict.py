"""The same as `keras-effnet predict`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["predict", *sys.argv[1:]]))
