"""measure the accuracy of .keras, .tflite and .onnx files on labelled photographs

The photographs stand in a folder per class, or in a .csv of paths and labels, or an .npz. Several
files are run on the same images and compared with the first. Int8 outputs hold many equal scores;
they count for the lower class, as everywhere in this package.

examples:
  keras-effnet evaluate flowers.tflite --data photos/validation
  keras-effnet evaluate flowers.keras flowers.tflite flowers.onnx --data photos/validation --json
  keras-effnet evaluate flowers.tflite --data photos/validation --per-class \\
      --confusion-matrix confusion.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.cli import common, opening
from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table

if TYPE_CHECKING:
    import numpy as np

    from keras_effnet.export.verify import Scores

# Confusion matrices of more classes are drawn without the names.
_NAMED_CLASSES = 40


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    opening.add_files(parser, several=True)
    parser.add_argument("--data", metavar="PATH", required=True, help="the labelled photographs")
    parser.add_argument(
        "--samples",
        metavar="N",
        type=common.positive_int,
        help="use at most so many of them (default: all)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=common.whole_number,
        default=0,
        help="of the choice of samples (default: 0)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail on an unreadable image instead of skipping it"
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=common.positive_int,
        default=16,
        help="images decoded at a time (default: 16)",
    )
    parser.add_argument("--per-class", action="store_true", help="show the accuracy of every class")
    parser.add_argument(
        "--confusion-matrix",
        metavar="FILE.png",
        help="draw which class of the first file was taken for which",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output file if it exists"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    from keras_effnet.export.files import check_target, write_whole

    opening.check_files(args, args.files)
    if len(set(args.files)) < len(args.files):
        raise UsageError("Each file is named once.")
    if not Path(args.data).exists():
        raise UsageError(f"--data: there is no {args.data!r}.")
    if args.confusion_matrix is not None:
        if not args.confusion_matrix.lower().endswith(".png"):
            raise UsageError(
                f"--confusion-matrix is a PNG file. Received: {args.confusion_matrix!r}"
            )
        common.checked(check_target, args.confusion_matrix, overwrite=args.overwrite)
        from keras_effnet.plotting import check_installed

        check_installed()

    files = [opening.open_file(path, args) for path in args.files]
    _check_alike(files)
    labels = opening.read_classes(args, files[0])
    images = opening.open_data(args.data, files[0], args, labels=labels, samples=args.samples)
    if images.labels is None:
        raise UsageError(
            f"{args.data!r} holds no labels: one sub-folder per class, or a .csv with the columns "
            "path and label, is needed. For photographs without labels use keras-effnet predict."
        )
    from keras_effnet.export.verify import predict_all

    total = math.ceil(len(images) / args.batch_size)
    batches = common.progress(images.batches(args.batch_size), total, "batches")
    outputs = predict_all({file.path: file.predict for file in files}, batches)
    scores = outputs.scores()
    names = opening.class_names(args, files[0])
    if labels is None and images.paths is not None and Path(args.data).is_dir():
        names = opening.folder_names(images, names)
    shares = {path: shares_by_class(array, images.labels) for path, array in outputs.arrays.items()}
    if args.confusion_matrix is not None:
        from keras_effnet.plotting import png

        shown, matrix = confusion_matrix(outputs.arrays[files[0].path], images.labels)
        figure = draw_confusion(
            matrix, tuple(names[index] for index in shown), Path(files[0].path).name
        )
        write_whole(args.confusion_matrix, png(figure), overwrite=args.overwrite)
    if args.json:
        print(json.dumps(_as_json(args, scores, shares, names, images), indent=2))
    else:
        print(_table(scores, files))
        if args.per_class:
            print()
            print(_class_table(shares, names))
    if args.confusion_matrix is not None:
        common.say(f"Written: {args.confusion_matrix}")


def _check_alike(files: list[opening.OpenedFile]) -> None:
    first = files[0]
    for file in files[1:]:
        if not file.takes_images_of(first) or file.classes != first.classes:
            raise UsageError(
                "Files that are evaluated together take the same images and have the same classes. "
                f"Received: {first.path!r} with {first.describe()}, and {file.path!r} with "
                f"{file.describe()}"
            )


def confusion_matrix(outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many images of each class (row) were taken for each class (column).

    Args:
        outputs: Shape `(images, classes)`.
        labels: Class indices, shape `(images,)`.

    Returns:
        The classes that occur, n of them in ascending order, and int64 of shape `(n, n)`.
    """
    import numpy as np

    # Of thousands of classes most do not occur, and would fill the memory.
    shown, places = np.unique(np.concatenate([labels, outputs.argmax(axis=1)]), return_inverse=True)
    rows, columns = np.split(places, 2)
    size = len(shown)
    counts = np.bincount(rows * size + columns, minlength=size**2)
    return shown, counts.reshape(size, size)


def shares_by_class(outputs: np.ndarray, labels: np.ndarray) -> dict[int, tuple[int, float]]:
    """Number of images and share of right ones, by class; classes without images are left out."""
    import numpy as np

    right = outputs.argmax(axis=1) == labels
    return {
        int(index): (int((labels == index).sum()), float(right[labels == index].mean()))
        for index in np.unique(labels)
    }


def draw_confusion(matrix: np.ndarray, names: tuple[str, ...], title: str) -> Any:
    """Draws a confusion matrix; shares of a row as shades, numbers where there is room.

    Raises:
        ImportError: If matplotlib is not installed; the message says how to install it.
    """
    import numpy as np

    from keras_effnet.plotting import check_installed

    check_installed()
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(3.2 + 0.42 * len(names), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _NAMED_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row in range(len(names)):
            for column in range(len(names)):
                if matrix[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(
                        column,
                        row,
                        str(matrix[row, column]),
                        ha="center",
                        va="center",
                        color=colour,
                    )
    axes.set_xlabel("chosen class")
    axes.set_ylabel("true class")
    axes.set_title(f"{title}: {matrix.trace() / max(matrix.sum(), 1):.1%} right")
    return figure


def _table(scores: list[Scores], files: list[opening.OpenedFile]) -> str:
    cells = [("file", "bytes", "images", "top-1", "top-5", "agreement", "SQNR")]
    for each, file in zip(scores, files, strict=True):
        first = each is scores[0]
        sqnr = "-" if first or each.sqnr_db is None else f"{each.sqnr_db:.1f} dB"
        cells.append(
            (
                each.name,
                f"{file.size:,}",
                str(each.images),
                f"{each.top1:.1%}",
                "-" if each.top5 is None else f"{each.top5:.1%}",
                "-" if first else f"{each.agreement:.1%}",
                sqnr,
            )
        )
    return text_table(cells)


def _class_table(shares: dict[str, dict[int, tuple[int, float]]], names: tuple[str, ...]) -> str:
    cells = [("class", "images", *(Path(path).name for path in shares))]
    for index, (images, _) in next(iter(shares.values())).items():
        found = (f"{each[index][1]:.1%}" for each in shares.values())
        cells.append((names[index], str(images), *found))
    return text_table(cells)


def _as_json(args, scores, shares, names, images) -> dict[str, Any]:
    entries = []
    times = Counter(names)  # Two classes of one name, as ImageNet has, keep their places apart.
    keys = [name if times[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]
    for each in scores:
        entry = dataclasses.asdict(each)
        entry["file"] = entry.pop("name")
        entry["per_class"] = {
            keys[index]: {"images": count, "top1": top1}
            for index, (count, top1) in shares[each.name].items()
        }
        entries.append(entry)
    return {
        "data": args.data,
        "images": len(images),
        "skipped": [{"path": str(path), "reason": reason} for path, reason in images.skipped],
        "files": entries,
    }
