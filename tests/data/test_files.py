"""Files that appear whole or not at all, and what stands in their place."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from ovisnb.data.files import write_json, written


def write(path, data: bytes = b"new") -> None:
    with written(path) as file:
        file.write(data)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.bin"
    write(path)
    with pytest.raises(KeyError), written(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_file_is_written(there, tmp_path):
    (tmp_path / "far").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "far" / "real.json"
    link.symlink_to("far/real.json")
    if there:
        file.write_text("old")
    write(link)
    assert link.is_symlink() and not file.is_symlink() and file.read_bytes() == b"new"
    assert os.listdir(tmp_path / "far") == ["real.json"]


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        read: list[bytes] = []
        reader = threading.Thread(target=lambda into=read: into.append((tmp_path / "pipe").read_bytes()), daemon=True)
        reader.start()
        write(tmp_path / name)
        reader.join(60)
        assert read == [b"new"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_folder_and_links_in_a_circle_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, number in (("folder", errno.EISDIR), ("loop", errno.ELOOP)):
        with pytest.raises(OSError) as caught:
            write(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["folder", "loop"]


def test_what_keeps_a_file_from_being_written_names_that_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        write(tmp_path / "file" / "a.json")
    assert caught.value.filename == str(tmp_path / "file" / "a.json")

    def replace(*paths):
        raise PermissionError(errno.EACCES, "Permission denied", *paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError) as caught:
        write_json({}, tmp_path / "b.json")
    assert caught.value.filename == str(tmp_path / "b.json") and ".tmp" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]

    def locked(path, *more, **options):
        raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))

    monkeypatch.setattr(type(tmp_path), "open", locked)
    monkeypatch.setattr(type(tmp_path), "unlink", locked)
    with pytest.raises(OSError) as caught:
        write_json({}, tmp_path / "b.json")
    assert caught.value.filename == str(tmp_path / "b.json") and ".tmp" not in str(caught.value)


def test_a_full_disk_names_the_file_and_not_what_was_read(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(OSError) as caught:
            write(tmp_path / "big.bin", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.filename == str(tmp_path / "big.bin") and not os.listdir(tmp_path)
    with pytest.raises(OSError) as caught, written(tmp_path / "a.bin"):
        raise OSError(errno.EIO, "read error")
    assert caught.value.filename is None
