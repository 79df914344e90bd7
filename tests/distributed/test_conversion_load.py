"""Every rank of a split model reads its own slices of a Hugging Face folder: logits equal transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_longpo.conversion.load import load_hf_weights
from megatron_longpo.conversion.logits import model_logits
from megatron_longpo.model.build import build_model, wrap_for_training
from megatron_longpo.training.distributed import initialize
from tests.conversion.models import MODELS, hf_logits, random_tokens, run_config, save_random_model
from tests.distributed.harness import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TP2,
    "tp2-sequence-parallel": TP2 | {"sequence_parallel": True},
    "pp2": PP2,
    "pp2-interleaved": PP2 | {"num_layers_per_virtual_pipeline_stage": 1},
}


def _logits_of_all(rank: int, folders: dict[str, Path]) -> dict[tuple[str, str], torch.Tensor]:
    """Logits of every model in every layout, ``[0, V]`` on stages that have none."""
    tokens, positions = random_tokens()
    logits = {}
    for layout, flags in LAYOUTS.items():
        initialize(run_config(next(iter(folders.values())), **flags))
        for name, folder in folders.items():
            config = run_config(folder, **flags)
            chunks = build_model(config)
            if name == "qwen3":
                chunks = wrap_for_training(config, chunks)
            load_hf_weights(config, chunks, folder)
            logits[name, layout] = model_logits(config, chunks, tokens, positions)
        parallel_state.destroy_model_parallel()
    return logits


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    tokens, positions = random_tokens()
    return {name: hf_logits(save_random_model(folder / name, name), tokens, positions) for name in MODELS} | {
        "folder": folder
    }


def test_split_models_have_the_logits_of_transformers(models: dict[str, Any]) -> None:
    folder = models.pop("folder")
    results = run_ranks(_logits_of_all, 2, {name: folder / name for name in models})
    for name, expected in models.items():
        for layout in LAYOUTS:
            found = [rank[name, layout] for rank in results if len(rank[name, layout])]
            assert len(found) == (1 if "pp" in layout else 2)
            for logits in found:
                assert (logits - expected).abs().max() < 1e-4, (name, layout)
