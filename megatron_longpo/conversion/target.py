"""Folders to convert into: checked before any long work, filled under another name, complete or empty in the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_longpo.files import check_folder_writable, failed_write, folder_lock, sync_file, sync_folder
from megatron_longpo.processes import uninterrupted

_PARTIAL = ".partial"


def check_target(folder: str | Path, num_bytes: int, overwrite: bool, sources: Mapping[str, str | Path]) -> None:
    """Refuse a target that holds something or cannot be written, or whose disk is too small.

    Args:
        folder: What ``--save`` gives; need not exist.
        num_bytes: Size of what will be written.
        overwrite: Whether ``--overwrite`` was given; a training run and what is read are never overwritten.
        sources: The folders that are read, by flag.

    Raises:
        ValueError: It is a file or one of the sources, is not empty or not writable, or its disk has too little room.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--save {folder} is a file; give a folder")
    for flag, source in sources.items():
        if folder.exists() and Path(source).exists() and folder.samefile(source):
            raise ValueError(f"--save {folder} is the folder of {flag}, which stays as it is: give another folder")
    if steps := sorted(path.name for path in folder.glob("iter_*")):
        raise ValueError(f"--save {folder} holds checkpoints of a training run ({steps[0]}): give another folder")
    held = sorted(path.name for path in folder.iterdir() if path.name != _PARTIAL) if folder.is_dir() else []
    if held and not overwrite:
        shown = ", ".join(held[:3]) + (", …" if len(held) > 3 else "")
        raise ValueError(f"--save {folder} is not empty ({shown}): give another folder, or --overwrite")
    check_folder_writable(folder, "--save", create=False)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise ValueError(
            f"--save {folder}: the result takes {num_bytes / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free"
        )


@contextmanager
def filled_folder(folder: str | Path, stale: Collection[str], last: str) -> Iterator[Path]:
    """A folder to write into, whose content is moved to ``folder`` when the block ends without an error.

    It lies inside ``folder``, so on the same disk even where that is a mount. ``last`` is what readers look for first:
    it goes away before anything else and comes back after everything else, so that a process that is killed at any
    moment leaves the old content, the new, or none that looks complete.

    Args:
        folder: Where the content goes.
        stale: Names or patterns of old content to remove, besides what is replaced by name.
        last: Name of the file that makes the content complete.

    Raises:
        OSError: It could not be written; the message says where.
        ValueError: Another process is writing there.
    """
    folder = Path(folder)
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    complaint = f"--save {folder}: another process is writing there; wait for it, or give another folder"
    with folder_lock(folder, complaint):
        yield from _filled(folder, existed, stale, last)


def _filled(folder: Path, existed: bool, stale: Collection[str], last: str) -> Iterator[Path]:
    partial = folder / _PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_dir():
                    sync_folder(path)
                else:
                    sync_file(path)
        except (OSError, RuntimeError) as error:
            problem = _problem_of_writing(error, partial)
            if problem is None:
                raise
            raise OSError(
                f"--save {folder} could not be written: {problem}; what was there before is as it was"
            ) from error
        # Interrupted in between, the removal of what is left would take the old content with it.
        with uninterrupted():
            _publish(partial, folder, stale, last)
    finally:
        with uninterrupted():
            shutil.rmtree(partial, ignore_errors=True)
            if not existed and not any(folder.iterdir()):
                folder.rmdir()


def _problem_of_writing(error: OSError | RuntimeError, partial: Path) -> object:
    """What to say of a write that failed; None for another error."""
    if isinstance(error, RuntimeError):
        return failed_write(error)
    # A write that fails for want of room names no file, or one that is gone by now.
    if error.filename is None or partial in Path(error.filename).parents:
        return error.strerror or error
    return None


def _publish(partial: Path, folder: Path, stale: Collection[str], last: str) -> None:
    fresh = [path for path in partial.iterdir() if path.name != last]
    # Made while the old content is whole: a full disk has no room for it.
    old = partial / ".old"
    old.mkdir()
    (folder / last).unlink(missing_ok=True)
    sync_folder(folder)
    # Moved, not removed: what takes long to remove must not lie half removed under its name.
    replaced = {path for pattern in stale for path in folder.glob(pattern)} | {folder / path.name for path in fresh}
    for path in replaced:
        if path.exists() or path.is_symlink():
            os.rename(path, old / path.name)
    for path in fresh:
        os.rename(path, folder / path.name)
    sync_folder(folder)
    os.rename(partial / last, folder / last)
    sync_folder(folder)
