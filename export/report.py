"""The report of an export: what was written, how, and how good it is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .check import TargetReport
from .files import write_whole
from .to_onnx import ONNXExport
from .to_tflite import TFLiteExport
from .verify import MIN_AGREEMENT, Scores, Thresholds, WorstImage

if TYPE_CHECKING:
    from keras_effnet.quantization import Analysis

SCHEMA = 2

Export = TFLiteExport | ONNXExport

_PACKAGES = (
    "keras-effnet",
    "keras",
    "tensorflow",
    "ai-edge-litert",
    "tf2onnx",
    "onnx",
    "onnxruntime",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class ImagesUsed:
    """A set of images that an export used.

    Args:
        source: Path of the set, or a description of it.
        images: Number of images.
        labelled: Whether their classes are known.
        skipped: `(path, reason)` of the files that could not be read.
    """

    source: str
    images: int
    labelled: bool
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """The outcome of one export; `write_report` writes it as JSON.

    The JSON object has these keys:

    - `schema`: 1, the version of this list;
    - `command`: the command line, as a list of words;
    - `versions`: of Python and of the packages that took part;
    - `model`: `name`, `weights` (as given), `input_shape` (height, width, channels), `classes`,
      `parameters`;
    - `sizes`: `float_bytes` and `int8_bytes`, of the model's parameters in these types, to compare
      the file with; empty if nobody counted;
    - `quantizer`: null if nothing was calibrated, else how a float model was quantized: `name`
      ("core": this package, or "converter") and, of the core, the fields of its
      `QuantizationConfig`;
    - `file`: `path`, `bytes`, `quantization`, `io_dtype`, `inputs` and `outputs` (each with
      `name`, `dtype`, `shape`, `scale`, `zero_point`) and `ops` (how often each operator occurs).
      Of a TFLite file also `inner_float_tensors` (how many float tensors, constants included,
      stand between input and output; 0 in an integer-only file). Of an ONNX file also `opset`,
      `layout`, `external_data` (path of the file of weights, or null) and what onnxruntime runs
      on this processor after its own optimization: `optimized_ops`, `float_ops` (those that
      compute on floats) and `conversions` (how many convert between floats and integers);
    - `calibration`: null, or the images used: `source`, `images`, `labelled`, `skipped` (a list of
      `path` and `reason`);
    - `verification`: the same of the images on which the models were compared;
    - `accuracy`: one entry per model, the Keras model first: the fields of `Scores`, shares in
      0..1, null where unknown;
    - `thresholds`: what was demanded of the file, the fields of `Thresholds`;
    - `failures`: what it does not reach, texts; empty if all is well;
    - `worst_images`: the images on which it is farthest from the Keras model, the fields of
      `WorstImage` and the `path` of the image or null;
    - `targets`: what each device makes of a TFLite file, see `TargetReport.as_json`, without the
      single operators; empty for ONNX;
    - `layers`: null, or what quantization does to each tensor and kernel, see `Analysis.as_json`;
    - `seconds`: by stage;
    - `warnings`: texts; empty if all is well.

    Args:
        command: The command line.
        model: As above.
        export: What `to_tflite` or `to_onnx` wrote.
        calibration: Images used, or None.
        verification: Images used.
        scores: Of the Keras model and of the file.
        seconds: By stage.
        warnings: Texts.
        quantizer: As above.
        sizes: As above.
        thresholds: As above.
        failures: As above.
        worst: As above.
        worst_paths: Of the images in `worst`; empty if they do not come from files.
        targets: As above.
        analysis: What stands in `layers`.
    """

    command: tuple[str, ...]
    model: dict[str, Any]
    export: Export
    calibration: ImagesUsed | None
    verification: ImagesUsed
    scores: tuple[Scores, ...]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    quantizer: dict[str, Any] | None = None
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    thresholds: Thresholds = Thresholds()
    failures: tuple[str, ...] = ()
    worst: tuple[WorstImage, ...] = ()
    worst_paths: tuple[str, ...] = ()
    targets: tuple[TargetReport, ...] = ()
    analysis: Analysis | None = None

    def as_json(self) -> dict[str, Any]:
        """The object described above, made of plain Python types."""
        file = self.export.file
        return {
            "schema": SCHEMA,
            "command": list(self.command),
            "versions": package_versions(),
            "model": self.model,
            "sizes": self.sizes,
            "quantizer": self.quantizer,
            "file": {
                "path": str(self.export.path),
                "bytes": file.size,
                "quantization": self.export.quantization,
                "io_dtype": self.export.io_dtype,
                "inputs": [_tensor(tensor) for tensor in file.inputs],
                "outputs": [_tensor(tensor) for tensor in file.outputs],
                "ops": file.ops,
                **_particulars(self.export),
            },
            "calibration": None if self.calibration is None else _images(self.calibration),
            "verification": _images(self.verification),
            "accuracy": [dataclasses.asdict(scores) for scores in self.scores],
            "thresholds": dataclasses.asdict(self.thresholds),
            "failures": list(self.failures),
            "worst_images": [
                dataclasses.asdict(image) | {"path": path}
                for image, path in zip(
                    self.worst, self.worst_paths or (None,) * len(self.worst), strict=True
                )
            ],
            "targets": [_target(verdict) for verdict in self.targets],
            "layers": None if self.analysis is None else self.analysis.as_json(),
            "seconds": {stage: round(seconds, 1) for stage, seconds in self.seconds.items()},
            "warnings": list(self.warnings),
        }


def agreement_warning(quantization: str, scores: Scores) -> str | None:
    """A warning if a file agrees with its model on fewer images than `MIN_AGREEMENT` demands.

    Args:
        quantization: Of the file.
        scores: Of the file, compared with the Keras model.

    Returns:
        The text, or None if the agreement is high enough.
    """
    wanted = MIN_AGREEMENT[quantization]
    if scores.agreement >= wanted:
        return None
    return (
        f"The {quantization} file chooses the class of the Keras model on only "
        f"{scores.agreement:.1%} of {scores.images} images (at least {wanted:.0%} are expected). "
        "Do not deploy it without a remedy: other calibration images, correction or "
        "quantization-aware training."
    )


def package_versions() -> dict[str, str]:
    """Version of Python and of the installed packages that take part in an export."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_report(path: str | os.PathLike, report: ExportReport, *, overwrite: bool = False) -> Path:
    """Writes a report as JSON, whole or not at all.

    Args:
        path: File to write, usually `*.json`.
        report: The outcome of an export.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The path.

    Raises:
        OSError: As `to_tflite`.
    """
    text = json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_whole(path, text.encode(), overwrite=overwrite)


def _particulars(export: Export) -> dict[str, Any]:
    if isinstance(export, TFLiteExport):
        return {"inner_float_tensors": len(export.file.inner_floats)}
    data = export.external_data
    return {
        "opset": export.file.opset,
        "layout": export.layout,
        "external_data": None if data is None else str(data),
        "optimized_ops": export.optimized.ops,
        "float_ops": export.optimized.float_ops,
        "conversions": export.optimized.conversions,
    }


def _target(verdict: TargetReport) -> dict[str, Any]:
    written = verdict.as_json()
    del written["operators"]  # Of a float file, all of them.
    return written


def _tensor(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "scale": list(tensor.scale),
        "zero_point": list(tensor.zero_point),
    }


def _images(used: ImagesUsed) -> dict[str, Any]:
    return {
        "source": used.source,
        "images": used.images,
        "labelled": used.labelled,
        "skipped": [{"path": path, "reason": reason} for path, reason in used.skipped],
    }
