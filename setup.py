"""Packaging of keras_effnet; `export/` is installed as `keras_effnet.export`."""

from pathlib import Path

from setuptools import setup

# The version is read as text: importing the package would import Keras.
VERSION = next(
    line.split('"')[1]
    for line in Path("keras_effnet/version.py").read_text().splitlines()
    if line.startswith("__version__")
)

# Building, training and saving models need Keras and one backend alone.
# The lower bounds are what Python 3.10 gets, the oldest that was run; the upper bounds are the
# next release that nobody has run yet.
TENSORFLOW = "tensorflow>=2.21,<2.22"
LITERT = "ai-edge-litert>=2.3,<3"
EXTRAS = {
    "convert": [TENSORFLOW, "safetensors>=0.5"],
    "completion": ["shtab>=1.7,<2"],
    "plot": ["matplotlib>=3.10"],
    "tflite": [TENSORFLOW, LITERT],
    "onnx": [
        TENSORFLOW,
        "tf2onnx>=1.17,<2",
        "onnx>=1.23,<2",
        "onnxruntime>=1.23,<2",
    ],
    "tfmot": [
        TENSORFLOW,
        "tf_keras>=2.21,<2.22",
        "tensorflow-model-optimization>=0.8.1,<0.9",
    ],
}
EXTRAS["all"] = sorted({requirement for group in EXTRAS.values() for requirement in group})
EXTRAS["dev"] = [
    *EXTRAS["all"],
    "jax>=0.6.2",
    "pytest>=8",
    "ruff>=0.11",
    "scikit-learn>=1.7",
    "psutil>=6",
    "pytest-xdist>=3.6",
    "tensorboard>=2.19",
]
EXTRAS["quickstart"] = sorted(
    {*EXTRAS["tflite"], *EXTRAS["onnx"], *EXTRAS["plot"], "scikit-learn>=1.7"}
)

setup(
    name="keras-effnet",
    version=VERSION,
    description="EfficientNet in Keras 3 for phones and edge boards: int8 TFLite and ONNX "
    "that keep the accuracy",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[
        "keras_effnet",
        "keras_effnet.cli",
        "keras_effnet.conversion",
        "keras_effnet.export",
        "keras_effnet.quantization",
        "keras_effnet.quantization.tfmot",
        "keras_effnet.training",
    ],
    package_dir={"keras_effnet.export": "export"},
    package_data={"keras_effnet": ["__init__.pyi"]},
    install_requires=[
        "keras>=3.12,<4",
        "h5py>=3.14",
        "lazy-loader>=0.5",
        "numpy>=2.2",
        "pillow>=12",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["keras-effnet = keras_effnet.cli:main"]},
    classifiers=[
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
