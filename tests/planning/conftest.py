"""A model's folder for the planner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.planning.cases import HF_CONFIG


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    return tmp_path
