import errno
import os
import resource
import stat

import pytest

from keras_effnet.export import files
from keras_effnet.export.files import check_target, write_whole


def test_writes_the_content_and_nothing_else(tmp_path):
    path = write_whole(tmp_path / "a.bin", b"content")
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_gives_the_permissions_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    written = write_whole(tmp_path / "written", b"")
    wanted = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert stat.S_IMODE(written.stat().st_mode) == wanted


def test_check_leaves_no_trace(tmp_path):
    check_target(tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []


def test_replaces_an_existing_file_only_when_asked(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="exists.*--overwrite"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    write_whole(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"


def test_refuses_a_missing_folder_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder.*Create it first"):
        check_target(tmp_path / "missing" / "a.bin")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_target(tmp_path)


def test_refuses_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    # Root may write anywhere, so that permission bits would test nothing.
    monkeypatch.setattr(files.Path, "touch", refuse)
    with pytest.raises(PermissionError, match="Cannot write.*a.bin.*Permission denied"):
        check_target(tmp_path / "a.bin")


@pytest.mark.parametrize("existing", [None, b"old"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch, existing):
    path = tmp_path / "a.bin"
    if existing is not None:
        path.write_bytes(existing)
    before = os.listdir(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="a.bin.*the disk is full.*Nothing was written"):
        write_whole(path, b"new", overwrite=True)
    assert os.listdir(tmp_path) == before
    assert existing is None or path.read_bytes() == existing


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="a.bin.*10,000 bytes.*File too large"):
            write_whole(tmp_path / "a.bin", bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.bin", b"new")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_of_the_check_leaves_nothing(tmp_path, monkeypatch):
    touch = files.Path.touch

    def touch_and_interrupt(self, **keywords):
        touch(self, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(files.Path, "touch", touch_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_target(tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []
