"""Keeps the logs of native code (converter, interpreter) off the user's terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

logger = logging.getLogger("keras_effnet.export")


@contextlib.contextmanager
def native_logs_muted() -> Iterator[None]:
    """Drops what native code writes to file descriptor 2.

    TensorFlow and LiteRT log from C++, out of reach of Python's `logging`, and some of it cannot
    be switched off. Errors are not lost: they arrive as exceptions. Python's own `sys.stderr`
    goes on to reach the terminal, for progress and warnings. Nothing is dropped while the logger
    `keras_effnet.export` has the level DEBUG.
    """
    if logger.isEnabledFor(logging.DEBUG):
        yield
        return
    stderr = sys.stderr
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as sink, open(terminal, "w", buffering=1) as python_stderr:
        stderr.flush()
        if _is_descriptor_2(stderr):
            sys.stderr = python_stderr
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            sys.stderr = stderr


@contextlib.contextmanager
def loggers_muted(*names: str) -> Iterator[None]:
    """Keeps what libraries say by Python's logging off the terminal; errors are exceptions."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    if logger.isEnabledFor(logging.DEBUG):
        loggers = []
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=False):
            each.setLevel(level)


def _is_descriptor_2(stream: object) -> bool:
    # Notebooks and test runners replace sys.stderr by something without a descriptor.
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):
        return False
