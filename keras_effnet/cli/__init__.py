"""The console command `keras-effnet COMMAND …`.

Each command is one module of this package with a docstring (its help), `configure(parser)` and
`run(args)`. It is called like its module, with hyphens. What a command needs is imported inside
`run`, so that `--help` answers at once; `run` raises `common.UsageError` for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from keras_effnet.cli import (
    benchmark,
    check_tflite,
    common,
    completion,
    convert_weights,
    evaluate,
    export_onnx,
    export_tflite,
    family,
    inspect,
    predict,
    quickstart,
    scale,
    train,
    train_qat,
)

COMMANDS = (
    benchmark,
    check_tflite,
    completion,
    convert_weights,
    evaluate,
    export_onnx,
    export_tflite,
    family,
    inspect,
    predict,
    quickstart,
    scale,
    train,
    train_qat,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments after the program's name, or None for those of the process.

    Returns:
        The exit code: 0 for success, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C.
        argparse itself exits with 0 after `--help` and 2 for arguments it cannot read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(argv)
    args.command_line = ("keras-effnet", *argv)
    return common.guarded(args)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="keras-effnet",
        description="EfficientNet in Keras 3, for phones and edge boards.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        help_text, _, _ = module.__doc__.partition("\n")
        subparser = subparsers.add_parser(
            name,
            help=help_text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(subparser)
        subparser.add_argument(
            "--debug", action="store_true", help="show the traceback of an error and all logs"
        )
        subparser.set_defaults(run=module.run)
    return parser
