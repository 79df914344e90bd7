"""Processes of dry runs: what reaches them."""

from __future__ import annotations

import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from megatron_longpo.planning.parallel_dry_runs import _as_completed, _progress, _submit


def test_ctrl_c_does_not_reach_a_worker_even_while_it_starts() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        blocked = _submit(pool, signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_log_says_what_is_done_from_the_first_second_and_what_was_done_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with _progress("dry runs of 3 layouts", 4) as bar:
        assert "dry runs of 3 layouts: 0 of 4 pipeline stages, 00:00 so far, ? left" in capsys.readouterr().err
        bar.update()
    assert "1 of 4 pipeline stages" in capsys.readouterr().err


def test_time_moves_while_no_stage_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with ThreadPoolExecutor(2) as pool, _progress("dry runs", 2) as bar:
        stages = [pool.submit(time.sleep, seconds) for seconds in (1.3, 0)]
        assert list(_as_completed(stages, bar)) == stages[::-1]
    assert "1 of 2 pipeline stages, 00:01 so far" in capsys.readouterr().err
