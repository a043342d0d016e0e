"""print a script that completes the commands and their options in a shell

The script is static: completing loads nothing of this package. Print it anew after an update.

examples:
  keras-effnet completion bash > ~/.local/share/bash-completion/completions/keras-effnet
  keras-effnet completion zsh > ~/.zfunc/_keras-effnet
"""

from __future__ import annotations

import argparse

_SHELLS = ("bash", "zsh", "tcsh")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("shell", choices=_SHELLS, help="the shell")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        ImportError: If shtab is not installed; the message says how to install it.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            f"`shtab` is needed to write completions ({error}). "
            'Install it with: pip install "keras-effnet[completion]"'
        ) from error
    from keras_effnet.cli import make_parser

    print(shtab.complete(make_parser(), shell=args.shell))
