"""How a rank ends that cannot go on: with its own words, at once, without waiting for the others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_longpo.config import RunConfig
from megatron_longpo.training import distributed

FAILING = """
import threading
from megatron_longpo import command, processes

def job(*_):
    threading.Thread(target=threading.Event().wait).start()  # as the threads of process groups
    raise {error}

processes._RANK_0_SPEAKS_FIRST_S = 0
command.parse_command_line = lambda: None
command._run = job
command.run_command(None)
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("OSError('no space left')", "-c: error (rank 1): no space left\n"),
        ("RuntimeError('CUDA out of memory')", "RuntimeError: CUDA out of memory\n"),
    ],
)
def test_a_rank_says_why_it_ends_and_waits_for_nobody(error: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING.format(error=error)],
        env=os.environ | {"RANK": "1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.endswith(said)
    assert ("Traceback" in done.stderr) == ("Runtime" in error)


@pytest.mark.parametrize(("ranks", "left"), [(1, True), (2, False)])
def test_groups_are_left_after_an_error_by_a_rank_that_is_alone(
    ranks: int, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(distributed, "initialize", lambda config: calls.append("in"))
    monkeypatch.setattr(distributed, "shut_down", lambda: calls.append("out"))
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    with distributed.process_groups(RunConfig()):
        pass
    with pytest.raises(OSError, match="no space"), distributed.process_groups(RunConfig()):
        raise OSError("no space")
    assert calls == ["in", "out", "in"] + ["out"] * left
