"""The same as `keras-effnet benchmark`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["benchmark", *sys.argv[1:]]))
