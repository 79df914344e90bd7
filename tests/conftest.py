"""Settings of all tests, and a world of one process for those that build models."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# One BLAS thread a process, also without make: two workers, each with up to four ranks, share the cores, and kernels
# allocate for every thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared machines are slow at times: what matters is what is found, not how fast examples are drawn.
settings.register_profile("longpo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("longpo")

# A shell that starts pytest in the background lets it ignore Ctrl-C, and every command that the tests start too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Iterator[None]:
    """Commands that a test runs in this process handle signals from then on, and would go on after it."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def world_of_one() -> Iterator[None]:
    """Megatron's parallel state for this process alone."""
    from megatron_longpo.config import RunConfig  # most tests need no Megatron
    from megatron_longpo.training.distributed import initialize, shut_down

    initialize(RunConfig.from_flat_dict({"use_cpu": True, "distributed_backend": "gloo"}))
    yield
    shut_down()
