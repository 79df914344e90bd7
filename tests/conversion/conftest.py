"""A world of one process for the tests that build models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_longpo.config import RunConfig
from megatron_longpo.training.distributed import initialize, shut_down


@pytest.fixture(scope="module")
def world_of_one() -> Iterator[None]:
    initialize(RunConfig.from_flat_dict({"use_cpu": True, "distributed_backend": "gloo"}))
    yield
    shut_down()
