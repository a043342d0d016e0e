"""TFLite metadata: what a file tells of itself, and the names of its classes.

MediaPipe Tasks and Android's tools read them: how pixels become the input, what the scores mean,
the names of the classes. They are a FlatBuffer of their own in a buffer of the model
(https://github.com/google-ai-edge/mediapipe/blob/master/mediapipe/tasks/metadata/metadata_schema.fbs);
the names stand in a text file in a ZIP archive behind the model, so that `unzip` reads them.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import pack
from ._optional import import_tflite_schema
from .tflite_file import describe, load_checked, read_tflite

LABELS_FILE = "labels.txt"
METADATA_NAME = "TFLITE_METADATA"

_METADATA_IDENTIFIER = b"M001"
# The first version of the metadata that knows all that is written here.
_MIN_PARSER_VERSION = "1.0.0"
# Values of enumerations and unions in the schema.
_AXIS_LABELS = 2
_RGB = 1
_IMAGE_PROPERTIES, _FEATURE_PROPERTIES = 2, 1
_NORMALIZATION = 1
# Numbers of the fields of its tables.
_MODEL = {
    "name": 0,
    "description": 1,
    "version": 2,
    "subgraphs": 3,
    "author": 4,
    "license": 5,
    "parser": 7,
}
_SUBGRAPH = {"name": 0, "inputs": 2, "outputs": 3}
_TENSOR = {"name": 0, "description": 1, "content": 3, "units": 4, "stats": 5, "files": 6}
# The date of entries of a ZIP archive; a fixed one makes equal files of equal models.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class ModelMetadata:
    """What a file tells of itself.

    Args:
        name: Of the model.
        description: What it does.
        version: Of the model, e.g. `"1.0"`.
        license: Under which it may be used.
        author: Who made it.
        mean: The input is `(pixel - mean) / std` for pixels in 0..255: one value, or one per
            channel. 0 and 1, the default, are for models that read pixels as they are.
        std: See `mean`.
        labels: Names of the classes, in the order of the outputs, or None.

    Raises:
        ValueError: If `mean` and `std` do not fit each other, `std` is not positive, or a label
            is empty or has a line break.
    """

    name: str
    description: str = ""
    version: str = ""
    license: str = ""
    author: str = ""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                "`mean` and `std` hold one value, or one per RGB channel. "
                f"Received: mean={self.mean}, std={self.std}"
            )
        if not min(self.std) > 0:
            raise ValueError(f"`std` must be positive. Received: std={self.std}")
        for index, label in enumerate(self.labels or ()):
            if not label.strip() or len(label.splitlines()) != 1:
                raise ValueError(
                    f"Every class needs a name of one line. Received: {label!r} for class {index}"
                )


def add_metadata(data: bytes, metadata: ModelMetadata) -> bytes:
    """Puts metadata into a TFLite model of one input, an RGB image, and one output, scores.

    Args:
        data: The content of the file. Metadata that it has already are replaced.
        metadata: What to put in.

    Returns:
        The content of the new file. Operators, tensors and constants are those of the old one.

    Raises:
        ImportError: If LiteRT, which holds the file format, is not installed.
        ValueError: If it is no TFLite file, or the metadata do not fit its input and output.
    """
    schema = import_tflite_schema()
    file = read_tflite(data)
    if len(file.inputs) != 1 or len(file.outputs) != 1:
        raise ValueError(
            "Metadata are written for one input and one output. Received: "
            f"{len(file.inputs)} inputs and {len(file.outputs)} outputs"
        )
    shape, classes = file.inputs[0].shape, file.outputs[0].shape[-1]
    if len(shape) != 4 or shape[-1] != 3:
        raise ValueError(
            f"Metadata are written for RGB images (1, height, width, 3). Received: input {shape}"
        )
    if metadata.labels is not None and len(metadata.labels) != classes:
        raise ValueError(
            f"The labels name {len(metadata.labels)} classes, but the file has {classes}."
        )
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    kept = [entry for entry in model.metadata or [] if _text(entry.name) != METADATA_NAME]
    old = [entry for entry in model.metadata or [] if _text(entry.name) == METADATA_NAME]
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(_metadata_buffer(metadata, file), np.uint8)
    if old:
        index = old[0].buffer
        model.buffers[index] = buffer
    else:
        index = len(model.buffers)
        model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name, entry.buffer = METADATA_NAME, index
    model.metadata = [*kept, entry]
    packed = pack.pack_model(model, schema)
    if metadata.labels is None:
        return packed
    # MediaPipe maps the names into memory as they are, so they are not compressed.
    archive = io.BytesIO(packed)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_STORED) as zipped:
        text = "".join(f"{label}\n" for label in metadata.labels)
        zipped.writestr(zipfile.ZipInfo(LABELS_FILE, _EPOCH), text.encode())
    return archive.getvalue()


def read_metadata(source: str | os.PathLike | bytes) -> ModelMetadata | None:
    """Reads the metadata of a TFLite file, of whatever origin.

    Args:
        source: Path, or the bytes of the file.

    Returns:
        What it tells of itself, or None if it has no metadata. Normalization that is missing is
        that of pixels as they are; labels are those of the first output.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If LiteRT, which holds the file format, is not installed.
        ValueError: If it is no TFLite file, or the file or its metadata are damaged.
    """
    schema = import_tflite_schema()
    data = load_checked(source)
    model = schema.Model.GetRootAs(data, 0)
    for index in range(model.MetadataLength()):
        entry = model.Metadata(index)
        if _text(entry.Name() or b"") != METADATA_NAME:
            continue
        content = model.Buffers(entry.Buffer()).DataAsNumpy()
        try:
            return _read_metadata(content.tobytes(), data)
        except (
            struct.error,
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            zipfile.BadZipFile,
            RuntimeError,
        ) as error:
            raise ValueError(f"The metadata of {describe(source)} are damaged: {error}.") from error
    return None


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


# Writing


def _metadata_buffer(metadata: ModelMetadata, file: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(4096)
    image, scores = file.inputs[0], file.outputs[0]
    normalization = _table(
        builder,
        {0: _floats(builder, metadata.mean), 1: _floats(builder, metadata.std)},
    )
    unit = _union_table(builder, 0, _NORMALIZATION, normalization)
    highest = [(255.0 - mean) / std for mean, std in zip(metadata.mean, metadata.std, strict=True)]
    lowest = [-mean / std for mean, std in zip(metadata.mean, metadata.std, strict=True)]
    stats = _table(builder, {0: _floats(builder, highest), 1: _floats(builder, lowest)})
    colours = _table(builder, {0: ("int8", _RGB)})
    content = _union_table(builder, 0, _IMAGE_PROPERTIES, colours)
    height, width = image.shape[1:3]
    inputs = _table(
        builder,
        {
            _TENSOR["name"]: builder.CreateString("image"),
            _TENSOR["description"]: builder.CreateString(
                f"RGB photograph of {height} x {width} pixels."
            ),
            _TENSOR["content"]: content,
            _TENSOR["units"]: _offsets(builder, [unit]),
            _TENSOR["stats"]: stats,
        },
    )
    fields = {
        _TENSOR["name"]: builder.CreateString("score"),
        _TENSOR["description"]: builder.CreateString(
            f"Scores of the {scores.shape[-1]} classes, higher is likelier."
        ),
        _TENSOR["content"]: _union_table(builder, 0, _FEATURE_PROPERTIES, _table(builder, {})),
        _TENSOR["stats"]: _table(builder, {0: _floats(builder, [1.0]), 1: _floats(builder, [0.0])}),
    }
    if metadata.labels is not None:
        labels = _table(
            builder,
            {
                0: builder.CreateString(LABELS_FILE),
                1: builder.CreateString("Names of the classes, one per line."),
                2: ("int8", _AXIS_LABELS),
            },
        )
        fields[_TENSOR["files"]] = _offsets(builder, [labels])
    outputs = _table(builder, fields)
    subgraph = _table(
        builder,
        {
            _SUBGRAPH["inputs"]: _offsets(builder, [inputs]),
            _SUBGRAPH["outputs"]: _offsets(builder, [outputs]),
        },
    )
    fields = {_MODEL["parser"]: builder.CreateString(_MIN_PARSER_VERSION)}
    for field in ("name", "description", "version", "author", "license"):
        value = getattr(metadata, field)
        if value:
            fields[_MODEL[field]] = builder.CreateString(value)
    fields[_MODEL["subgraphs"]] = _offsets(builder, [subgraph])
    builder.Finish(_table(builder, fields), file_identifier=_METADATA_IDENTIFIER)
    return bytes(builder.Output())


def _table(builder: Any, fields: dict[int, Any]) -> int:
    """Writes a table: offsets, or `("int8", value)`, by the numbers of the fields."""
    builder.StartObject(max(fields, default=-1) + 1)
    for number, value in fields.items():
        if isinstance(value, tuple):
            builder.PrependInt8Slot(number, value[1], 0)
        else:
            builder.PrependUOffsetTRelativeSlot(number, value, 0)
    return builder.EndObject()


def _union_table(builder: Any, number: int, kind: int, offset: int) -> int:
    """Writes a table whose fields `number` and `number + 1` are a union."""
    return _table(builder, {number: ("int8", kind), number + 1: offset})


def _floats(builder: Any, values: Sequence[float]) -> int:
    return builder.CreateNumpyVector(np.asarray(values, np.float32))


def _offsets(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


# Reading


class _Reader:
    """A table of a FlatBuffer, read by the numbers of its fields; all bounds are checked."""

    def __init__(self, data: bytes, start: int):
        self.data, self.start = data, start
        vtable = start - self._unpack("<i", start)
        if vtable < 0:
            raise ValueError("a table lies outside the metadata")
        [size] = struct.unpack_from("<H", data, vtable)
        self.places = [
            self._unpack("<H", vtable + 4 + 2 * number) for number in range((size - 4) // 2)
        ]

    def _unpack(self, form: str, position: int) -> int:
        if position < 0:
            raise ValueError("an offset leads outside the metadata")
        return struct.unpack_from(form, self.data, position)[0]

    def _target(self, number: int) -> int | None:
        if number >= len(self.places) or not self.places[number]:
            return None
        position = self.start + self.places[number]
        return position + self._unpack("<I", position)

    def number(self, number: int) -> int:
        if number >= len(self.places) or not self.places[number]:
            return 0
        return self._unpack("<b", self.start + self.places[number])

    def table(self, number: int) -> _Reader | None:
        target = self._target(number)
        return None if target is None else _Reader(self.data, target)

    def vector(self, number: int, width: int) -> bytes:
        target = self._target(number)
        if target is None:
            return b""
        length = width * self._unpack("<I", target)
        content = self.data[target + 4 : target + 4 + length]
        if len(content) < length:
            raise ValueError("a vector leads outside the metadata")
        return content

    def text(self, number: int) -> str:
        return self.vector(number, 1).decode()

    def floats(self, number: int) -> tuple[float, ...]:
        return tuple(np.frombuffer(self.vector(number, 4), np.float32).tolist())

    def tables(self, number: int) -> list[_Reader]:
        target = self._target(number)
        count = len(self.vector(number, 4)) // 4
        places = [target + 4 + 4 * index for index in range(count)]
        return [_Reader(self.data, place + self._unpack("<I", place)) for place in places]


def _read_metadata(content: bytes, data: bytes) -> ModelMetadata:
    if content[4:8] != _METADATA_IDENTIFIER:
        raise ValueError(f"bytes 4 to 8 are not {_METADATA_IDENTIFIER!r}")
    model = _Reader(content, struct.unpack_from("<I", content, 0)[0])
    found: dict[str, Any] = {
        field: model.text(_MODEL[field])
        for field in ("name", "description", "version", "author", "license")
    }
    for subgraph in model.tables(_MODEL["subgraphs"])[:1]:
        for image in subgraph.tables(_SUBGRAPH["inputs"])[:1]:
            for unit in image.tables(_TENSOR["units"]):
                options = unit.table(1)
                if unit.number(0) == _NORMALIZATION and options is not None:
                    found |= {"mean": options.floats(0), "std": options.floats(1)}
        for scores in subgraph.tables(_SUBGRAPH["outputs"])[:1]:
            for file in scores.tables(_TENSOR["files"]):
                if file.number(2) == _AXIS_LABELS and "labels" not in found:
                    found["labels"] = _labels(file.text(0), data)
    return ModelMetadata(**found)


def _labels(name: str, data: bytes) -> tuple[str, ...]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = archive.getinfo(name)
        # A name takes no more than the file itself, unless the archive is a bomb.
        if entry.file_size > max(len(data), 2**20):
            raise ValueError(f"{name!r} unpacks to {entry.file_size:,} bytes")
        text = archive.read(entry).decode("utf-8-sig")
    return tuple(text.splitlines())
