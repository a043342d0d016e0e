"""The same as `keras-effnet evaluate`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
