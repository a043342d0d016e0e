import logging
import os
import sys

from keras_effnet.export._console import logger, native_logs_muted


def test_drops_what_native_code_writes_and_keeps_what_python_writes(capfd):
    with native_logs_muted():
        os.write(2, b"from native code\n")
        print("from Python", file=sys.stderr)
    os.write(2, b"afterwards\n")
    written = capfd.readouterr().err
    assert "from native code" not in written
    assert "from Python" in written
    assert "afterwards" in written


def test_restores_the_descriptor_after_an_error(capfd):
    try:
        with native_logs_muted():
            raise KeyError
    except KeyError:
        os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"


def test_drops_nothing_while_debugging(capfd, monkeypatch):
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.manager._clear_cache()
    with native_logs_muted():
        os.write(2, b"from native code\n")
    assert "from native code" in capfd.readouterr().err
    logger.manager._clear_cache()
