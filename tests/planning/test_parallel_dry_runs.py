"""Processes of dry runs: what reaches them."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor

from megatron_longpo.planning.parallel_dry_runs import _submit


def test_ctrl_c_does_not_reach_a_worker_even_while_it_starts() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        blocked = _submit(pool, signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
