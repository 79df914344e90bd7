"""One rank of a split model that loads a checkpoint and writes logits; `verify` starts it under torchrun.

torchrun --nproc-per-node TP*PP -m megatron_longpo.conversion.split_logits CHECKPOINT TP PP INPUTS.pt LOGITS.pt
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_longpo import platform
from megatron_longpo.config import ParallelConfig, RunConfig
from megatron_longpo.conversion.logits import model_logits
from megatron_longpo.model.build import build_model
from megatron_longpo.training.checkpoint import Checkpointer
from megatron_longpo.training.checkpoint_folder import saved_config
from megatron_longpo.training.distributed import initialize, shut_down


def main() -> None:
    """Compute logits of INPUTS.pt under CHECKPOINT; the first tensor-parallel rank of the last stage writes them."""
    checkpoint, inputs, output = Path(sys.argv[1]), sys.argv[4], sys.argv[5]
    parallel = ParallelConfig(
        tensor_model_parallel_size=int(sys.argv[2]), pipeline_model_parallel_size=int(sys.argv[3])
    )
    config = dataclasses.replace(RunConfig(), model=saved_config(checkpoint).model, parallel=parallel)
    config = config.with_device_defaults("local", *platform.device_defaults()[1:])
    initialize(config)
    chunks = build_model(config)
    Checkpointer(config, chunks).load(checkpoint, weights_only=True)
    wanted = torch.load(inputs, weights_only=True)
    logits = model_logits(config, chunks, wanted["tokens"], wanted["positions"])
    if len(logits) and parallel_state.get_tensor_model_parallel_rank() == 0:
        torch.save(logits, output)
    shut_down()


if __name__ == "__main__":
    main()
