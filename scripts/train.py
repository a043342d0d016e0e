"""The same as `keras-effnet train`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
