"""The same as `keras-effnet completion`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["completion", *sys.argv[1:]]))
