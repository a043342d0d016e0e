"""What the devices take that a TFLite file is made for, as data, each row with its source.

`check.check_file` judges a file by these tables, `to_tflite(target=...)` writes one that fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

GENERIC, ANDROID, CORAL = "generic", "android", "coral"

# Names of shape and option rules; `check` holds the functions.
NO_FUSED_ACTIVATION = "no fused activation"
NO_DILATION = "no dilation"
EQUAL_DILATION = "equal dilation"
CONSTANT_KERNEL = "constant kernel"
PER_TENSOR_KERNEL = "per-tensor kernel"
FLAT_OUTPUT = "one-dimensional output"
SPATIAL_AXES = "spatial axes"
SMALL_MEAN = "small mean"
SPATIAL_PADDING = "spatial padding"
SHORT_SOFTMAX = "short softmax"
UNIT_STRIDES = "unit strides"
KEPT_AXES = "four dimensions"
FEW_INPUTS = "two to four inputs"

# A mean over 64 x 128 pixels is reported to map, one over 256 x 128 not (google-coral/edgetpu
# issue 461); over 256 x 256 the compiler fails (issue 183). Between nobody has told.
LARGEST_MEAN = 64 * 128
SMALLEST_FAILING_MEAN = 256 * 128
# "Softmax: 1-D input of at most 16,000 elements" (Coral, supported operations).
LONGEST_SOFTMAX = 16_000


@dataclass(frozen=True)
class OpRule:
    """How a target takes one operator.

    Args:
        op: Name in the TFLite schema.
        source: Where this stands.
        version: Highest version that the target parses, or None for any.
        rules: Names of rules on shapes and options, out of the constants of this module.
        dtypes: Types of the tensors that it computes, or () for those of the target.
        remark: What else to know.
    """

    op: str
    source: str
    version: int | None = None
    rules: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Remark:
    """Something to know of a target that no file shows.

    Args:
        text: One or two sentences.
        source: Where this stands.
    """

    text: str
    source: str


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Args:
        name: As in `--target`.
        title: For people.
        accelerator: What the operators are mapped to.
        ops: What it takes, by operator; empty if it takes all of TFLite's own.
        dtypes: Types of computed tensors that it takes; empty for any.
        io_dtypes: Types of the input and the output that it takes; empty for any.
        constant_shapes: Whether all sizes must be known, with a batch of 1.
        max_rank: Number of inner dimensions that may exceed 1, or None.
        needs_all: Whether an operator that is not mapped is a fault of the file; otherwise it
            runs elsewhere on the device, slower.
        cache_bytes: On-chip memory for parameters, or None.
        remarks: What else to know.
    """

    name: str
    title: str
    accelerator: str
    ops: dict[str, OpRule] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    io_dtypes: tuple[str, ...] = ()
    constant_shapes: bool = False
    max_rank: int | None = None
    needs_all: bool = True
    cache_bytes: int | None = None
    remarks: tuple[Remark, ...] = ()


# Versions: the highest that existed in TensorFlow 2.5, the newest that the compiler 16.0 (July
# 2021, the last) was built with: every rejection that was found is of a higher one.
_VERSIONS = "tensorflow/lite/tools/versioning/runtime_version.cc, entries up to 2.5.0"
_CORAL_OPS = "https://coral.ai/docs/edgetpu/models-intro/#supported-operations; " + _VERSIONS
_CORAL_MODEL = "https://coral.ai/docs/edgetpu/models-intro/#model-requirements"
_CORAL_MEAN = f"{_CORAL_OPS}; github.com/google-coral/edgetpu issues 183 and 461"


def _coral(
    op: str, version: int, *rules: str, source: str = _CORAL_OPS, remark: str = ""
) -> OpRule:
    return OpRule(op, source, version, rules, remark=remark)


def _table(rules: Iterable[OpRule]) -> dict[str, OpRule]:
    return {rule.op: rule for rule in rules}


_CORAL_ROWS = (
    _coral("ADD", 3),
    _coral("AVERAGE_POOL_2D", 3, NO_FUSED_ACTIVATION),
    _coral("CONCATENATION", 3, NO_FUSED_ACTIVATION),
    _coral("CONV_2D", 5, CONSTANT_KERNEL, EQUAL_DILATION),
    _coral("DEPTHWISE_CONV_2D", 6, CONSTANT_KERNEL, NO_DILATION),
    _coral("EXPAND_DIMS", 1),
    _coral(
        "FULLY_CONNECTED",
        9,
        CONSTANT_KERNEL,
        FLAT_OUTPUT,
        PER_TENSOR_KERNEL,
        remark="Kernels with a scale for each unit need version 12.",
    ),
    _coral("L2_NORMALIZATION", 2),
    _coral("LOGISTIC", 3),
    _coral("MAXIMUM", 4),
    _coral("MAX_POOL_2D", 3, NO_FUSED_ACTIVATION),
    _coral("MEAN", 3, SPATIAL_AXES, SMALL_MEAN, source=_CORAL_MEAN),
    _coral("MINIMUM", 4),
    _coral("MUL", 4),
    _coral("PACK", 3),
    _coral("PAD", 3, SPATIAL_PADDING),
    _coral("PRELU", 1),
    _coral("QUANTIZE", 2),
    _coral("REDUCE_MAX", 3, SPATIAL_AXES),
    _coral("REDUCE_MIN", 3, SPATIAL_AXES),
    _coral("RELU", 3),
    _coral("RELU6", 3),
    _coral("RELU_N1_TO_1", 3),
    _coral("RESHAPE", 1, remark="Large ones may stay on the processor."),
    _coral("RESIZE_BILINEAR", 4, remark="Some sizes stay on the processor."),
    _coral("RESIZE_NEAREST_NEIGHBOR", 4, remark="Some sizes stay on the processor."),
    _coral("RSQRT", 2),
    _coral("SLICE", 5),
    _coral("SOFTMAX", 3, SHORT_SOFTMAX),
    _coral("SPACE_TO_DEPTH", 2),
    _coral("SPLIT", 4),
    _coral("SQUARED_DIFFERENCE", 2),
    _coral("SQUEEZE", 2),
    _coral("STRIDED_SLICE", 5, UNIT_STRIDES),
    _coral("SUB", 5),
    _coral("SUM", 2, SPATIAL_AXES),
    _coral("TANH", 3),
    _coral("TRANSPOSE", 5),
    _coral("TRANSPOSE_CONV", 3, CONSTANT_KERNEL),
)

_FLOAT, _INT8 = ("float32",), ("int8", "uint8")
_BOTH = (*_FLOAT, *_INT8)
_XNNPACK = "tensorflow/lite/delegates/xnnpack/README.md, supported operators"


def _xnnpack(op: str, dtypes: tuple[str, ...], *rules: str) -> OpRule:
    return OpRule(op, _XNNPACK, rules=rules, dtypes=dtypes)


_ANDROID_ROWS = (
    *(_xnnpack(op, _FLOAT) for op in ("ABS", "CEIL", "DIV", "FLOOR", "HARD_SWISH", "MAXIMUM")),
    *(_xnnpack(op, _FLOAT) for op in ("MINIMUM", "NEG", "PRELU", "RELU", "RELU6", "RELU_N1_TO_1")),
    *(_xnnpack(op, _FLOAT) for op in ("ROUND", "SOFTMAX", "SQRT", "SQUARE", "SQUARED_DIFFERENCE")),
    _xnnpack("AVERAGE_POOL_2D", _FLOAT),
    *(_xnnpack(op, _BOTH) for op in ("ADD", "DEPTH_TO_SPACE", "ELU", "LEAKY_RELU", "LOGISTIC")),
    *(_xnnpack(op, _BOTH) for op in ("MAX_POOL_2D", "MUL", "PAD", "RESHAPE", "RESIZE_BILINEAR")),
    *(_xnnpack(op, _BOTH) for op in ("SLICE", "SPACE_TO_DEPTH", "SPLIT", "SUB", "TANH")),
    *(_xnnpack(op, _BOTH) for op in ("TRANSPOSE", "DEQUANTIZE", "QUANTIZE")),
    _xnnpack("CONCATENATION", _BOTH, FEW_INPUTS),
    _xnnpack("CONV_2D", _BOTH, CONSTANT_KERNEL),
    _xnnpack("DEPTHWISE_CONV_2D", _BOTH, CONSTANT_KERNEL),
    _xnnpack("FULLY_CONNECTED", _BOTH, CONSTANT_KERNEL),
    _xnnpack("MEAN", _BOTH, SPATIAL_AXES, KEPT_AXES),
    _xnnpack("STRIDED_SLICE", _BOTH, UNIT_STRIDES),
    _xnnpack("TRANSPOSE_CONV", _BOTH, CONSTANT_KERNEL),
)

TARGETS: dict[str, Target] = {
    GENERIC: Target(
        GENERIC,
        "any device with LiteRT",
        accelerator="LiteRT",
        remarks=(
            Remark(
                "Operators of TFLite run wherever LiteRT runs; custom and Flex ones need a build "
                "of its own that brings them.",
                "https://ai.google.dev/edge/litert/models/ops_custom",
            ),
        ),
    ),
    ANDROID: Target(
        ANDROID,
        "Android, LiteRT with XNNPACK",
        accelerator="XNNPACK",
        ops=_table(_ANDROID_ROWS),
        dtypes=_BOTH,
        constant_shapes=True,
        needs_all=False,
        remarks=(
            Remark(
                "The GPU delegate computes in float16 or float32; it takes 8-bit files too and "
                "computes them as floats, so int8 saves memory there and no time.",
                "https://ai.google.dev/edge/litert/performance/gpu",
            ),
            Remark(
                "NNAPI is deprecated since Android 15: use XNNPACK or the GPU delegate.",
                "https://developer.android.com/ndk/guides/neuralnetworks/migration-guide",
            ),
            Remark(
                "Kernels with a scale for each unit of a dense layer need FULLY_CONNECTED 12, "
                "which LiteRT and TensorFlow Lite have since 2.14.",
                "tensorflow/lite/tools/versioning/op_version.cc",
            ),
        ),
    ),
    CORAL: Target(
        CORAL,
        "Coral, Edge TPU compiler 16.0",
        accelerator="Edge TPU",
        ops=_table(_CORAL_ROWS),
        dtypes=_INT8,
        io_dtypes=_INT8,
        constant_shapes=True,
        max_rank=3,
        # 8 MB of SRAM; the compiler keeps some for the program, and reports 7 to 7.7 MB as free.
        cache_bytes=7_700_000,
        remarks=(
            Remark(
                "The compiler maps operators in the order of the file and leaves the first that it "
                "does not know, and all behind it, to the processor.",
                "https://coral.ai/docs/edgetpu/models-intro/#compiling",
            ),
            Remark(
                "About 8 MB of on-chip memory hold the program and the parameters; what does not "
                "fit is sent over USB or PCIe for every image.",
                "https://coral.ai/docs/edgetpu/compiler/#parameter-data-caching",
            ),
            Remark(
                "Large activations can make the compiler give up although each operator is known: "
                "try a smaller input.",
                "github.com/google-coral/edgetpu issue 512",
            ),
            Remark(
                "The table cannot replace the compiler, which refuses some operators for reasons "
                "it does not tell.",
                _CORAL_MODEL,
            ),
        ),
    ),
}


def get_target(name: str) -> Target:
    """The target of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in TARGETS:
        raise ValueError(f"`target` must be one of {tuple(TARGETS)}. Received: {name!r}")
    return TARGETS[name]
