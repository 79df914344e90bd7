"""A run that leaves is not ended by another SIGTERM, and what killed runs left behind goes when one starts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.training.checkpoint import Checkpointer
from megatron_longpo.training.leaving import Leaving
from tests.distributed.harness import run_ranks
from tests.tiny import write_tiny_dataset
from tests.training.commands import FLAGS, run_in_this_rank


def test_the_handler_stays_once_sigterm_has_come() -> None:
    settings = RunConfig.from_flat_dict({"exit_signal_handler": True}).training
    before = signal.getsignal(signal.SIGTERM)
    with Leaving(settings) as leaving:
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    try:
        with leaving:
            signal.raise_signal(signal.SIGTERM)
        assert leaving.signalled and signal.getsignal(signal.SIGTERM) != before
    finally:
        signal.signal(signal.SIGTERM, before)


def sigterm_at_every_wait(rank: int, flags: list[str], remains: str) -> list[tuple[int, str]]:
    """Run one command three times, with a SIGTERM whenever it begins to wait for a checkpoint."""
    finish = Checkpointer.finish

    def interrupted(self: Checkpointer, blocking: bool) -> None:
        if blocking:
            os.kill(os.getpid(), signal.SIGTERM)
        finish(self, blocking)

    platform.prepare()
    Checkpointer.finish = interrupted  # type: ignore[method-assign]
    command = ("pretrain_longpo.py", flags)
    results = run_in_this_rank([command, command])
    Path(remains).mkdir()
    return [*results, *run_in_this_rank([command])]


@pytest.mark.slow
def test_sigterm_while_the_last_checkpoint_is_written(tmp_path: Path) -> None:
    save, data = tmp_path / "save", write_tiny_dataset(tmp_path / "tiny", num_documents=4)
    flags = [*FLAGS, f"--data-path={data}", f"--save={save}", f"--load={save}", "--save-interval=1", "--train-iters=3"]
    flags += ["--exit-signal-handler", "--async-save", "--save-retain-interval=10"]
    remains = save / ".iter_0000002.removed"
    results = run_ranks(sigterm_at_every_wait, 1, flags, str(remains))[0]
    all_said = ("leaving after iteration 2", "3/       3", "nothing is left to train")
    for (code, output), said in zip(results, all_said, strict=True):
        assert code == 0 and said in output, output
    assert not remains.exists()
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert [path.name for path in save.glob("*iter_*")] == ["iter_0000003"]
