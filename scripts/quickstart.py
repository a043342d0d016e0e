"""The same as `keras-effnet quickstart`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["quickstart", *sys.argv[1:]]))
