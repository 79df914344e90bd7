"""Wherever a kill stops a save, the tracker names a whole checkpoint: every state of the folder, looked at in turn."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_longpo import platform
from megatron_longpo.arguments import parse_arguments
from megatron_longpo.model.build import build_model, unwrap
from megatron_longpo.training.checkpoint import Checkpointer, Progress
from megatron_longpo.training.checkpoint_folder import find_checkpoint
from megatron_longpo.training.distributed import initialize, shut_down
from tests.distributed.harness import run_ranks
from tests.tiny import MODEL_FLAGS

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def checkpointer(save: Path, *flags: str) -> tuple[Checkpointer, list[torch.nn.Module]]:
    """Of a new model, as a run that starts has it."""
    config = parse_arguments([*MODEL_FLAGS, f"--save={save}", *flags]).with_device_defaults("local", "gloo")
    chunks = build_model(config)
    return Checkpointer(config, chunks), chunks


def save_version(saver: tuple[Checkpointer, list[torch.nn.Module]], iteration: int, version: int) -> None:
    """Save weights that are all one number, which the progress has too; training goes on behind a background save."""
    for parameter in unwrap(saver[1][0]).parameters():
        parameter.data.fill_(version)
    progress = Progress(iteration, consumed_samples=version)
    saver[0].save(progress)
    progress.iteration += 1
    saver[0].finish(blocking=True)


def every_state(rank: int, folder: str) -> list[tuple[str, int, int, float, float]]:
    """Save again and again, and copy the folder before every change of a name or a file in it.

    Returns:
        Of each copy, in order: the newest checkpoint's name, iteration and version, its least and its largest weight.
    """
    save, copies = Path(folder, "save"), Path(folder, "copies")
    platform.prepare()
    initialize(parse_arguments(MODEL_FLAGS).with_device_defaults("local", "gloo"))
    retain = ["--save-interval=2", "--save-retain-interval=4"]
    (save / ".iter_0000001.removed").mkdir(parents=True)  # of an earlier kill
    first = checkpointer(save, *retain)
    synced = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        save_version(first, 2, version=1)
    # The writers of weights, which may be processes of their own, sync what they write. common.pt is not in 0.19's.
    others = {path.name for path in (save / "iter_0000002").iterdir() if path.suffix != ".distcp"}
    assert {"metadata.json", ".metadata", "run.yaml"} <= others
    assert others | {".iter_0000002.partial"} <= synced
    copying = False

    def copy(event: str, args: tuple[Any, ...]) -> None:
        nonlocal copying
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if copying or not (writes or event in CHANGES) or str(save) not in str(args[0]):
            return
        copying = True
        shutil.copytree(save, copies / f"{time.monotonic_ns():020d}")
        copying = False

    sys.addaudithook(copy)  # writers inherit it
    save_version(first, 4, version=2)
    save_version(first, 6, version=3)
    again = checkpointer(save, *retain, f"--load={save / 'iter_0000004'}")
    again[0].load(save / "iter_0000004")
    save_version(again, 6, version=4)
    background = checkpointer(save, *retain, "--async-save")
    background[0].load(save / "iter_0000006")
    save_version(background, 8, version=5)
    background[0]._remove = lambda *_: None  # type: ignore[method-assign]  # killed before it
    save_version(background, 10, version=6)
    save_version(background, 14, version=7)
    last = checkpointer(save, *retain)
    last[0].load(save / "iter_0000014")
    save_version(last, 18, version=8)
    copying = True
    states = []
    for place in [*sorted(copies.iterdir()), save]:
        found = find_checkpoint(place)
        assert found is not None
        loaded = again[0].load(found)
        weights = torch.cat([parameter.detach().flatten() for parameter in unwrap(again[1][0]).parameters()])
        limits = weights.min().item(), weights.max().item()
        states.append((found.name, loaded.iteration, loaded.consumed_samples, *limits))
    assert sorted(path.name for path in save.glob("*iter_*")) == ["iter_0000004", "iter_0000008", "iter_0000018"]
    shut_down()
    return states


@pytest.mark.slow
def test_every_state_of_the_folder_has_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    states = run_ranks(every_state, 1, str(tmp_path))[0]
    assert len(states) > 40
    for name, iteration, version, *weights in states:
        assert name == f"iter_{iteration:07d}" and weights == [version, version]
    # Going on from an earlier step replaces a later checkpoint: for a moment the earlier one is the newest.
    versions = [version for _, _, version, *_ in states]
    seen = [version for i, version in enumerate(versions) if i == 0 or versions[i - 1] != version]
    assert seen == [1, 2, 3, 2, 4, 5, 6, 7, 8]


def write_for_ever(folder: str) -> None:
    """Begin a background save whose writers do not come to an end."""
    platform.prepare()
    initialize(parse_arguments(MODEL_FLAGS).with_device_defaults("local", "gloo"))
    saver = checkpointer(Path(folder), "--async-save")
    os.fsync = lambda descriptor: time.sleep(1000)
    save_version(saver, 1, version=1)


@pytest.mark.slow
def test_writers_end_with_a_killed_rank(tmp_path: Path) -> None:
    rank = multiprocessing.get_context("spawn").Process(target=write_for_ever, args=(str(tmp_path),))
    rank.start()
    try:
        deadline = time.monotonic() + 60
        # The process of the save, those that write for it (threads from 0.19 on), and that which carries their results.
        while not list(tmp_path.glob(".iter_0000001.partial/*.distcp")):
            assert time.monotonic() < deadline and rank.is_alive()
            time.sleep(0.05)
        writers = psutil.Process(rank.pid).children(recursive=True)
        assert len(writers) > 1
    finally:
        rank.kill()
    _, alive = psutil.wait_procs(writers, timeout=10)
    for process in alive:
        process.kill()
    assert not alive
