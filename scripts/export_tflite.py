"""The same as `keras-effnet export-tflite`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["export-tflite", *sys.argv[1:]]))
