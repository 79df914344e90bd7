"""On a GPU: Megatron-Bridge, which needs Transformer Engine, fills the model with the same weights as we do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_longpo.config import RunConfig
from megatron_longpo.conversion.load import load_hf_weights
from megatron_longpo.model.build import build_model, unwrap
from megatron_longpo.training.distributed import initialize, shut_down
from tests.conversion.models import run_config, save_random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def gpu_world() -> Iterator[None]:
    initialize(RunConfig.from_flat_dict({"distributed_backend": "nccl"}))
    yield
    shut_down()


@pytest.mark.usefixtures("gpu_world")
@pytest.mark.parametrize("name", ["llama3.1", "llama3.2-tied", "mistral-nemo", "qwen2.5", "qwen3"])
def test_the_bridge_fills_the_model_as_we_do(name: str, tmp_path: Path) -> None:
    bridge = pytest.importorskip("megatron.bridge")
    save_random_model(tmp_path, name, torch.bfloat16)
    config = run_config(tmp_path, use_cpu=False, bf16=True, transformer_impl="transformer_engine")
    ours, theirs = build_model(config), build_model(config)
    load_hf_weights(config, ours, tmp_path)
    bridge.AutoBridge.from_hf_pretrained(str(tmp_path)).load_hf_weights([unwrap(chunk) for chunk in theirs])
    for (key, value), other in zip(unwrap(ours[0]).named_parameters(), unwrap(theirs[0]).parameters(), strict=True):
        rows = config.model.vocab_size if key.startswith(("embedding", "output_layer")) else None
        assert value[:rows].equal(other[:rows]), key
