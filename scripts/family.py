"""The same as `keras-effnet family`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["family", *sys.argv[1:]]))
