"""tell what a .keras, .tflite or .onnx file sees in photographs

Names of the classes come from the file itself, where it carries them, or from --labels.

examples:
  keras-effnet predict flowers.tflite photo.jpg
  keras-effnet predict flowers.onnx photos/ --top 1 --json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from keras_effnet.cli import common, opening
from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table

_BATCH = 16


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    opening.add_files(parser, several=False)
    parser.add_argument("photos", metavar="PHOTO", nargs="+", help="an image, or a folder of them")
    parser.add_argument(
        "--top",
        metavar="N",
        type=common.positive_int,
        default=5,
        help="show so many classes of each photograph (default: 5)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail on an unreadable image instead of skipping it"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    import numpy as np

    opening.check_files(args, [args.file])
    for path in args.photos:
        if not Path(path).exists():
            raise UsageError(f"There is no photograph {path!r}.")
    file = opening.open_file(args.file, args)
    names = opening.class_names(args, file)
    rows = []
    for path in args.photos:
        images = opening.open_data(path, file, args)
        batches = common.progress(
            images.batches(_BATCH), math.ceil(len(images) / _BATCH), "batches"
        )
        outputs = np.concatenate([file.predict(batch) for batch, _ in batches])
        if not np.isfinite(outputs).all():
            raise ValueError(f"{args.file!r} gives outputs that are not finite.")
        # Equal scores keep the order of the classes.
        best = np.argsort(-outputs, axis=1, kind="stable")[:, : args.top]
        for photo, scores, order in zip(images.paths or (path,), outputs, best, strict=True):
            classes = [
                {"index": int(index), "name": names[index], "score": float(scores[index])}
                for index in order
            ]
            rows.append({"photo": str(photo), "classes": classes})
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    cells = [("photograph", "class", "name", "score")]
    for row in rows:
        for place, each in enumerate(row["classes"]):
            shown = row["photo"] if place == 0 else ""
            cells.append((shown, str(each["index"]), each["name"], f"{each['score']:.4f}"))
    print(text_table(cells, left=(0, 2)))
