"""Split models read Hugging Face folders and converted checkpoints, and what they save converts back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_longpo.platform  # noqa: F401  before Megatron-Core  # isort: skip
import pytest
import torch
from megatron.core import parallel_state

from megatron_longpo.conversion.load import load_hf_weights
from megatron_longpo.conversion.logits import model_logits
from megatron_longpo.conversion.to_hf import convert_to_hf
from megatron_longpo.conversion.to_megatron import convert_to_megatron
from megatron_longpo.model.build import build_model, unwrap, wrap_for_training
from megatron_longpo.training.checkpoint import Checkpointer, Progress
from megatron_longpo.training.checkpoint_folder import find_checkpoint
from megatron_longpo.training.distributed import initialize
from megatron_longpo.training.optimizer import build_optimizer, build_scheduler
from tests.conversion.models import (
    MODELS,
    assert_same_weights,
    hf_logits,
    random_tokens,
    run_config,
    save_random_model,
)
from tests.distributed.harness import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TP2,
    "tp2-sequence-parallel": TP2 | {"sequence_parallel": True},
    "pp2": PP2,
    "pp2-interleaved": PP2 | {"num_layers_per_virtual_pipeline_stage": 1},
    "dp2-zero1": {"use_distributed_optimizer": True},
}
SAVED = {
    "qwen2.5": "tp2",
    "qwen3": "tp2-sequence-parallel",
    "llama3.2-tied": "pp2-interleaved",
    "mistral-nemo": "dp2-zero1",
}
"""Models with biases, with norms of queries and keys, with tied embeddings; and the layout that saves each."""


def _names(layout: str) -> list[str]:
    if layout in ("tp2", "pp2"):
        return list(MODELS)
    return ["mistral-nemo"] if layout == "dp2-zero1" else ["qwen3", "llama3.2-tied"]


def _work(rank: int, folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Logits of every model in every layout, ``[0, V]`` on stages that have none; some models are saved too."""
    tokens, positions = random_tokens()
    logits = {}
    for layout, flags in LAYOUTS.items():
        initialize(run_config(folder / "qwen3", **flags))
        for name in _names(layout):
            config = run_config(folder / name, save=str(folder / "saved" / name), **flags)
            chunks, optimizer, scheduler = build_model(config), None, None
            if layout == "dp2-zero1":
                chunks = wrap_for_training(config, chunks)
                optimizer = build_optimizer(config, chunks)
                scheduler = build_scheduler(config, optimizer, 100)
            load_hf_weights(config, chunks, folder / name)
            logits[name, layout] = model_logits(config, chunks, tokens, positions)
            if SAVED.get(name) == layout:
                Checkpointer(config, chunks, optimizer, scheduler).save(Progress(iteration=7))
                _same_from_checkpoint(config, chunks, folder / "megatron" / name)
        parallel_state.destroy_model_parallel()
    return logits


def _same_from_checkpoint(config: Any, expected: list[Any], folder: Path) -> None:
    chunks = build_model(config)
    Checkpointer(config, chunks).load(find_checkpoint(folder), weights_only=True)
    for chunk, other in zip(chunks, expected, strict=True):
        for (name, value), theirs in zip(unwrap(chunk).named_parameters(), unwrap(other).parameters(), strict=True):
            assert value.equal(theirs), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_split_models(folder: Path) -> None:
    tokens, positions = random_tokens()
    expected = {name: hf_logits(save_random_model(folder / name, name), tokens, positions) for name in MODELS}
    for name in SAVED:
        convert_to_megatron(folder / name, folder / "megatron" / name, show_progress=False)
    results = run_ranks(_work, 2, folder)
    for layout in LAYOUTS:
        for name in _names(layout):
            found = [rank[name, layout] for rank in results if len(rank[name, layout])]
            assert len(found) == (1 if layout.startswith("pp2") else 2)
            for logits in found:
                assert (logits - expected[name]).abs().max() < 1e-4, (name, layout)
    for name in SAVED:
        exported = folder / "exported" / name
        checkpoint = convert_to_hf(folder / "saved" / name, folder / name, exported, show_progress=False)
        assert checkpoint.name == "iter_0000007"
        assert_same_weights(folder / name, exported)
