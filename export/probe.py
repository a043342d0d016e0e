"""Trying a TFLite file in a process of its own, before this one loads it.

A file whose structure is sound can still hold nonsense, such as a stride of 0, on which native
kernels crash. Such a file ends the process that tries it, not the caller's.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

from ._optional import import_litert

_WORKER = Path(__file__).with_name("_worker.py")
# Address space of the process, beside that of the file's content, which may stand in it several
# times. An int8 B7 takes 0.4 GB in all; the rest is for floats and for larger inputs.
MEMORY_LIMIT = 4 * 2**30
_COPIES = 4
# A B7 runs in seconds on one thread of a slow processor.
TIMEOUT = 120.0


class Prober:
    """A process that tries files; as a context manager it ends with the block.

    Args:
        timeout: Seconds that one file may take.
        memory_limit: Bytes of address space that the process may take, beside those that the
            content of a file needs.

    Raises:
        ImportError: If LiteRT is not installed.
    """

    def __init__(self, *, timeout: float = TIMEOUT, memory_limit: int = MEMORY_LIMIT) -> None:
        import_litert()
        self._timeout, self._limit = timeout, memory_limit
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def check(self, path: str | os.PathLike) -> None:
        """Loads a file in LiteRT and runs it once, on zeros.

        Args:
            path: Of the file.

        Raises:
            OSError: If there is no such file.
            ValueError: If LiteRT refuses the file, crashes on it, or does not come to an end.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(_WORKER), "probe"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        limit = self._limit + _COPIES * os.path.getsize(path)
        request = {"path": os.fspath(Path(path).resolve()), "limit": limit}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It is dead; the empty answer below says so.
        ready, _, _ = select.select([self._process.stdout], [], [], self._timeout)
        if not ready:
            self.close()
            raise ValueError(f"LiteRT does not finish {str(path)!r} in {self._timeout:g} s.")
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self.close()
            raise ValueError(
                f"LiteRT crashes on {str(path)!r} (exit code {code}): the file is damaged, or uses "
                "an operator in a way that LiteRT does not support."
            )
        error = json.loads(answer)["error"]
        if error is not None:
            raise ValueError(f"LiteRT cannot run {str(path)!r}: {error}")


def check_runs(path: str | os.PathLike) -> None:
    """Tries one file; see `Prober.check`."""
    with Prober() as prober:
        prober.check(path)
