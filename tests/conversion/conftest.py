"""A model to convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conversion.models import save_random_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Hugging Face folder to convert, in bf16."""
    save_random_model(tmp_path / "llama", "llama2", torch.bfloat16)
    return tmp_path / "llama"
