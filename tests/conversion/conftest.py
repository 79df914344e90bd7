"""A world of one process for the tests that build models, and a model to convert."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_longpo.config import RunConfig
from megatron_longpo.training.distributed import initialize, shut_down
from tests.conversion.models import save_random_model


@pytest.fixture(scope="module")
def world_of_one() -> Iterator[None]:
    initialize(RunConfig.from_flat_dict({"use_cpu": True, "distributed_backend": "gloo"}))
    yield
    shut_down()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Hugging Face folder to convert, in bf16."""
    save_random_model(tmp_path / "llama", "llama2", torch.bfloat16)
    return tmp_path / "llama"
