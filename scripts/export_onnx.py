"""The same as `keras-effnet export-onnx`."""

import sys

import _checkout  # noqa: F401

from keras_effnet.cli import main

sys.exit(main(["export-onnx", *sys.argv[1:]]))
