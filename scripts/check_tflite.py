"""The same as `keras-effnet check-tflite`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["check-tflite", *sys.argv[1:]]))
