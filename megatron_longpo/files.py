"""Writing files so that a reader finds the old content or the new one, never half of it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_longpo.processes import uninterrupted

_BLOCK_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH_SAVE = ("inline_container", "iostream error")
"""In the RuntimeErrors with which torch.save fails to write, whatever the system's error was."""


def temporary_name(path: str | Path) -> Path:
    """A name beside ``path`` that no other process uses, on this machine or on another that shares the disk."""
    return Path(f"{path}.{socket.gethostname()}.{os.getpid()}.tmp")


def sync_file(path: str | Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as file:
        _sync(file.fileno(), path)


def replace_file(temporary: str | Path, path: str | Path) -> None:
    """Give a finished temporary file its name; after a power cut the name points to the old or to the new file."""
    sync_file(temporary)
    with uninterrupted():
        os.replace(temporary, path)
        sync_folder(Path(path).parent)


def sync_folder(folder: str | Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor, folder)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, path: str | Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        name_file(error, path)
        raise


@contextmanager
def atomic_writer(path: str | Path, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a file that takes its name only when the block ends without an error.

    The parent folder is created. A link stays, and the file that it points to is replaced. On any error, Ctrl-C
    included, the temporary file is removed and ``path`` is as it was before.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        text = {} if binary else {"encoding": "utf-8", "newline": "\n"}
        with open(temporary, "wb" if binary else "w", **text) as file:  # type: ignore[call-overload]
            yield file
        replace_file(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        name_file(error, path)
        raise


def name_file(error: BaseException | None, path: str | Path) -> None:
    """Put the name of the file that was being written into the error of a write, which says of no file."""
    if not isinstance(error, OSError) or error.filename is not None:
        return
    if error.errno is None:  # numpy's, which says "1000 requested and 0 written"
        error.args = (f"{error}, while this was written: '{path}'",)
        return
    if error.errno not in _NO_ROOM:  # it may be of something that was read to write this
        error.strerror = f"{error.strerror}, while this was written"
    error.filename = str(path)


@contextmanager
def file_named(path: str | Path) -> Iterator[None]:
    """Put a file's name, or a folder's, into the errors of the writes in the block."""
    try:
        yield
    except OSError as error:
        name_file(error, path)
        raise


def failed_write(error: BaseException) -> str | None:
    """The words of torch.save for a file that cannot be written, or None for any other error."""
    text = str(error).partition("\n")[0]
    return f"{text} (is the disk full?)" if any(words in text for words in _TORCH_SAVE) else None


def check_writable(path: str | Path, flag: str, example: str) -> None:
    """Find out before hours of work that `atomic_writer` could not write a file; creates its folder.

    Args:
        path: The file.
        flag: Where it was given, for the message.
        example: A good name in the place of a folder's.

    Raises:
        ValueError: It is a folder, or lies where nothing can be written.
    """
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a folder: give a file's name, such as {Path(path) / example}")
    if problem := problem_of_writing(path):
        raise ValueError(f"{flag} {path} cannot be written ({problem}): give a file in another folder")


def check_folder_writable(folder: str | Path, flag: str, create: bool = True) -> None:
    """Find out before hours of work that nothing could be written into a folder.

    Args:
        folder: The folder.
        flag: Where it was given, for the message.
        create: Create it; otherwise, where there is none, its nearest parent is looked at.

    Raises:
        ValueError: It is a file, or nothing can be written there.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"{flag} {folder} is a file: give a folder")
    if problem := problem_of_writing(Path(folder) / "probe", create):
        raise ValueError(f"{flag} {folder} cannot be written ({problem}): give another folder")


def problem_of_writing(path: str | Path, create: bool = True) -> str | None:
    """Why a file cannot be made there, or None; with ``create`` its folder is made."""
    folder = Path(path).parent
    places = (folder, *folder.absolute().parents)
    for place in places:
        if place.is_symlink() and not place.exists():
            return f"{place} is a link to {os.readlink(place)}, which is not there"
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(next(place for place in places if place.exists()) / Path(path).name)
        with uninterrupted():
            try:
                probe.touch()
            finally:
                probe.unlink(missing_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return None


def write_json(path: str | Path, content: Any) -> None:
    """Write one JSON value atomically."""
    with atomic_writer(path) as file:
        dump_json(content, file)


def dump_json(content: Any, file: IO[str]) -> None:
    """Write one JSON value as the project formats it."""
    json.dump(content, file, indent=1, ensure_ascii=False)
    file.write("\n")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class LockHeldError(ValueError):
    """Another process holds a lock."""


@contextmanager
def exclusive_lock(path: str | Path, complaint: str) -> Iterator[None]:
    """Hold a lock file while the block runs; the kernel releases it when the process ends, however it ends.

    Args:
        path: The lock file; created, and left behind.
        complaint: Message of the error.

    Raises:
        LockHeldError: Another process holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockHeldError(complaint) from error
        yield


@contextmanager
def folder_lock(folder: str | Path, complaint: str) -> Iterator[None]:
    """Hold a folder that exists while the block runs, as `exclusive_lock` does, and leave nothing behind.

    Raises:
        LockHeldError: Another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockHeldError(complaint) from error
        except OSError:
            pass  # some network file systems lock no folders: there, nobody is kept out
        yield
    finally:
        os.close(descriptor)
