"""The same as `keras-effnet train-qat`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["train-qat", *sys.argv[1:]]))
