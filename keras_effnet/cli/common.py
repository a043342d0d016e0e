"""What all commands share: errors, progress, arguments, the start of Keras."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
# What glibc's malloc.h calls the parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_T = TypeVar("_T")


class UsageError(Exception):
    """Arguments that cannot work, found before the work starts; exit code 2."""


def guarded(args: argparse.Namespace) -> int:
    """Calls `args.run(args)` and turns what it raises into one line on stderr and an exit code.

    Args:
        args: The parsed arguments, with `run` and `debug`.

    Returns:
        The exit code.
    """
    mute_native_logs(args.debug)
    keep_freed_memory()
    with _noted_interrupts() as interrupts:
        try:
            args.run(args)
        except (KeyboardInterrupt, Exception) as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                print("error: interrupted; nothing half-written was left", file=sys.stderr)
                return INTERRUPTED
            if args.debug:
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            return USAGE if isinstance(error, UsageError) else FAILURE
    return SUCCESS


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C adds to, before it raises KeyboardInterrupt as always.

    Libraries in C++ turn an interrupt of a Python function that they call into an error of their
    own; with the note it is told from a real one.
    """
    noted: list[int] = []

    def note(number, frame):
        noted.append(number)
        signal.default_int_handler(number, frame)

    # Only the main thread may change handlers, and a caller's own one is left alone.
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type's name if it has none."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        text = error.strerror
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


def mute_native_logs(debug: bool = False) -> None:
    """Sets what TensorFlow reads when it is imported, unless the user has set it."""
    if debug:
        logging.basicConfig()
        logging.getLogger("keras_effnet").setLevel(logging.DEBUG)
        return
    for variable, level in (
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
        ("ABSL_MIN_LOG_LEVEL", "3"),
        ("GRPC_VERBOSITY", "ERROR"),
    ):
        os.environ.setdefault(variable, level)


def keep_freed_memory() -> None:
    """Lets glibc reuse freed memory, unless the user has set up malloc.

    A training step frees and takes some gigabytes. glibc returns them to the system each time, and
    the page faults of taking them again cost up to half of the step on a CPU
    (`benchmarks/training_step.py`). Does nothing where the C library is another one.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        is_glibc = bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError):
        is_glibc = False
    if not is_glibc:
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_TRIM_THRESHOLD, -1)
    # Blocks of their own are unmapped when they are freed, and heaps of threads hold no large ones.
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_ARENA_MAX, 1)


def start_tensorflow() -> None:
    """Imports Keras on its TensorFlow backend, whatever the user's default is, without noise.

    Exporting converts TensorFlow graphs, and weights do not depend on the backend.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "tensorflow"
    from keras_effnet.export._console import native_logs_muted
    from keras_effnet.export._optional import import_tensorflow

    with native_logs_muted():
        import_tensorflow()
        import keras  # noqa: F401


def checked(check: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Calls a check of the library on arguments, so that its refusal counts as wrong usage.

    Raises:
        UsageError: If it refuses them.
    """
    try:
        return check(*args, **kwargs)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(one_line(error)) from error


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _at_least(1, text, "a positive whole number")


def whole_number(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _at_least(0, text, "a whole number of at least 0")


def _at_least(least: int, text: str, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{what} is needed, not {text!r}")
    return value


def say(text: str) -> None:
    """Tells on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Tells on stderr, between two rules, what must not be overlooked."""
    rule = "!" * 78
    print(f"{rule}\nWARNING: {text}\n{rule}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(name: str, text: str, seconds: dict[str, float]) -> Iterator[None]:
    """Tells what starts, and adds the time it took to `seconds[name]`."""
    say(text)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def progress(items: Iterable[_T], total: int, what: str) -> Iterator[_T]:
    """Counts items on one line of stderr while they are taken, if it is a terminal.

    Args:
        items: What to iterate.
        total: How many there are.
        what: Their name, in the plural.

    Yields:
        The items.
    """
    # Asked of the stream of the moment: native_logs_muted may stand between.
    shown = sys.stderr.isatty()
    for count, item in enumerate(items, start=1):
        yield item
        if shown:
            print(f"\r  {count}/{total} {what}", end="", file=sys.stderr, flush=True)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
