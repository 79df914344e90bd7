"""What conversions write into: nothing of value is overwritten, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from megatron_longpo.conversion import target
from megatron_longpo.convert_checkpoint import main
from megatron_longpo.files import folder_lock
from megatron_longpo.training.checkpoint_folder import find_checkpoint, saved_config
from tests.conversion.converting import to_hf, to_megatron


def test_a_full_target_is_refused_without_overwrite(llama: Path, tmp_path: Path) -> None:
    to_megatron(llama, tmp_path / "megatron")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"megatron is not empty \(latest_.*, release\): give .* or --overwrite"):
        to_megatron(llama, tmp_path / "megatron")
    with pytest.raises(ValueError, match=r"back is not empty \(notes.txt\)"):
        to_hf(tmp_path / "megatron", llama, tmp_path / "back")
    to_megatron(llama, tmp_path / "megatron", overwrite=True, rotary_base=123.0)
    assert saved_config(find_checkpoint(tmp_path / "megatron")).model.rotary_base == 123.0
    to_hf(tmp_path / "megatron", llama, tmp_path / "back", overwrite=True, max_shard_bytes=10_000)
    to_hf(tmp_path / "megatron", llama, tmp_path / "back", overwrite=True)
    # No shard of the export before is left, and what is not ours is.
    assert {path.name for path in (tmp_path / "back").glob("*")} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    }


def test_checkpoints_of_a_training_run_are_never_overwritten(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "iter_0000010").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds checkpoints of a training run \(iter_0000010\)"):
        to_megatron(llama, tmp_path / "run", overwrite=True)
    to_megatron(llama, tmp_path / "megatron")
    with pytest.raises(ValueError, match=r"holds checkpoints of a training run \(iter_0000010\)"):
        to_hf(tmp_path / "megatron", llama, tmp_path / "run", overwrite=True)


def test_a_target_that_cannot_be_written_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(
        ValueError, match=r"--save .*link cannot be written \(.*link is a link to gone, which is not th"
    ):
        to_megatron(llama, tmp_path / "link")
    with pytest.raises(ValueError, match=r"--save /proc/run cannot be written \(.*\): give another folder"):
        to_megatron(llama, Path("/proc/run"))


def test_a_second_writer_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    with (
        folder_lock(tmp_path / "megatron", ""),
        pytest.raises(ValueError, match=r"--save .*megatron: another process is writing there; wait for it"),
    ):
        to_megatron(llama, tmp_path / "megatron")
    assert list((tmp_path / "megatron").iterdir()) == []
    to_megatron(llama, tmp_path / "megatron")


def test_what_is_read_is_never_overwritten(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    to_megatron(model, tmp_path / "megatron")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "same").symlink_to(model)
    with pytest.raises(ValueError, match=r"same is the folder of --hf-model, which stays as it is"):
        to_hf(tmp_path / "megatron", model, tmp_path / "same", overwrite=True)
    with pytest.raises(ValueError, match=r"model is the folder of --hf-model"):
        to_megatron(model, model, overwrite=True)
    with pytest.raises(ValueError, match=r"megatron is the folder of --load"):
        to_hf(tmp_path / "megatron", model, tmp_path / "megatron", overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_file_is_no_target(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--save .*file is a file; give a folder"):
        to_megatron(llama, tmp_path / "file")


def test_too_little_disk_is_found_before_writing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_megatron(llama, tmp_path / "megatron")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    for convert in (
        lambda: to_megatron(llama, tmp_path / "new" / "deep"),
        lambda: to_hf(tmp_path / "megatron", llama, tmp_path / "new" / "deep"),
    ):
        with pytest.raises(ValueError, match=r"takes 0.000\d+ GB and its disk has 1e-06 GB free"):
            convert()
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_half_way_leaves_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_megatron(llama, tmp_path / "megatron")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        source, save = ["--hf-model", str(llama)], ["--save", str(tmp_path / "new")]
        codes = [
            main(["hf-to-megatron", *source, *save]),
            main(["megatron-to-hf", "--load", str(tmp_path / "megatron"), *source, *save]),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert codes == [2, 2]
    assert capsys.readouterr().err.count("new could not be written: File too large; what was there before is as") == 2
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_for_torch_is_no_traceback(tmp_path: Path) -> None:
    message = rf"--save {tmp_path} could not be written: .*; what was there before is as it was"
    with pytest.raises(OSError, match=message), target.filled_folder(tmp_path, stale=[], last="last"):
        torch.save({"weights": torch.zeros(9)}, "/dev/full")
    with pytest.raises(RuntimeError, match="another"), target.filled_folder(tmp_path, stale=[], last="last"):
        raise RuntimeError("another")
    # A file that is not being written.
    with pytest.raises(OSError, match=r"gone: '/shard'$"), target.filled_folder(tmp_path, stale=[], last="last"):
        raise FileNotFoundError(errno.ENOENT, "gone", "/shard")


def test_a_disk_that_is_full_at_the_end_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, *words: object) -> None:
        if folder.name == ".old":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        os.mkdir(folder)

    (tmp_path / "last").write_text("old")
    monkeypatch.setattr(Path, "mkdir", lambda folder, *words, **flags: folder.exists() or full(folder))
    with pytest.raises(OSError, match="No space left"), target.filled_folder(tmp_path, stale=[], last="last") as folder:
        (folder / "last").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["last"] and (tmp_path / "last").read_text() == "old"


def test_what_completes_a_folder_comes_when_the_rest_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses power may have done any of what it has not been waited for, in any order."""
    events: list[str] = []

    def place(path: str | Path) -> str:
        return str(Path(path).relative_to(tmp_path))

    def sync(descriptor: int) -> None:
        events.append(place(os.readlink(f"/proc/self/fd/{descriptor}")))

    rename = os.rename

    def renamed(old: Path, new: Path) -> None:
        events.append(f"{place(old)} -> {place(new)}")
        assert not (tmp_path / "last").exists(), "a mixture of old and new looks complete"
        rename(old, new)

    (tmp_path / "last").write_text("old")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", renamed)
    with target.filled_folder(tmp_path, stale=[], last="last") as folder:
        (folder / "last").write_text("new")
        (folder / "release").mkdir()
        (folder / "release" / "weights").write_text("new")
    written = {".partial/last", ".partial/release", ".partial/release/weights"}
    *before, release, again, last, end = events
    assert written < set(before)
    assert (release, last) == (".partial/release -> release", ".partial/last -> last")
    assert (again, end) == (".", ".")
