"""Atomic files: the old content or the new one, and no traces of a failure."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from megatron_longpo.files import atomic_writer, check_folder_writable, check_writable, file_hash, write_json


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    with atomic_writer(path) as file:
        file.write("half")
        file.flush()
        assert not path.exists()
        file.write(" and half")
    assert path.read_text() == "half and half"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    link, there = tmp_path / "file.txt", tmp_path / "other disk" / "file.txt"
    there.parent.mkdir()
    there.write_text("old")
    link.symlink_to(there)
    with atomic_writer(link) as file:
        file.write("new")
    assert link.is_symlink() and there.read_text() == "new" and list(there.parent.iterdir()) == [there]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_content(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_writer(path) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write(b"x" * 2000), r"File too large: '.*file.bin'"),
        (lambda file: np.save(file, np.zeros(9000)), r"9000 requested and \d+ written, .* written: '.*file.bin'"),
    ],
    ids=["bytes", "array"],
)
def test_a_full_disk_names_the_file(tmp_path: Path, write: Callable[[IO[bytes]], object], message: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=message), atomic_writer(tmp_path / "file.bin", binary=True) as file:
            write(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file.txt", "."])
def test_a_failing_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Some disks report what could not be written only when they are waited for; the error knows a descriptor only."""

    def fail(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir() == (path == "."):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match=rf"Input/output error, while this was written: '{tmp_path / path}"),
        atomic_writer(tmp_path / "file.txt") as file,
    ):
        file.write("x")


def test_json_keeps_its_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": ["✓"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": ["✓"]}
    assert "✓" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_hash_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    content = b"0123456789" * 200_000
    (tmp_path / "large").write_bytes(content)
    assert file_hash(tmp_path / "large") == hashlib.sha256(content).hexdigest()


def test_what_cannot_be_written_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("gone")
    says = "link is a link to gone, which is not there): give a"
    for check in (
        lambda: check_folder_writable("link", "--save"),
        lambda: check_folder_writable("link", "--save", create=False),
        lambda: check_folder_writable("link/deep/er", "--save"),
        lambda: check_writable("link/file", "--output", "pairs.jsonl"),
    ):
        with pytest.raises(ValueError, match=f"^--(save|output) link.* cannot be written .*{re.escape(says)}"):
            check()
    check_folder_writable("new/er", "--save", create=False)
    assert [path.name for path in Path().iterdir()] == ["link"]
    with pytest.raises(ValueError, match="--save /proc/run cannot be written"):
        check_folder_writable("/proc/run", "--save", create=False)
    check_folder_writable("new/er", "--save")
    assert list(Path("new").iterdir()) == [Path("new/er")] and not list(Path("new/er").iterdir())
