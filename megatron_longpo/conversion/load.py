"""Filling a model straight from a Hugging Face folder, each rank reading only its own slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_longpo.config import RunConfig
from megatron_longpo.conversion.hf_config import read_hf_folder
from megatron_longpo.conversion.hf_weights import HFWeights
from megatron_longpo.conversion.layouts import Shard
from megatron_longpo.conversion.names import named_parameters
from megatron_longpo.conversion.plan import planned_weights


def load_hf_weights(config: RunConfig, chunks: list[Any], folder: str | Path) -> None:
    """Fill this rank's parameters in place, one at a time, cast to their type.

    An optimizer that was built before holds fp32 copies: call its ``reload_model_params`` afterwards. No collectives.

    Args:
        config: The run; its model is that of the folder, up to what no weight depends on.
        chunks: This rank's model chunks, built for the run, split over TP, PP and virtual PP, bare or wrapped.
        folder: A Hugging Face checkpoint.

    Raises:
        ValueError: The folder is damaged or of another model. Nothing is changed then.
    """
    family = read_hf_folder(folder).family
    model = config.model
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    shard = Shard(parallel_state.get_tensor_model_parallel_rank(), tp_size)
    padded_vocab = model.padded_vocab_size(tp_size)
    with HFWeights(folder) as files:
        weights = {weight.name: weight for weight in planned_weights(family, model, files)}
        targets = list(named_parameters(chunks))
        for name, parameter in targets:
            assert parameter.shape == weights[name].layout.shape(model, padded_vocab, shard), name
        wanted = {"on": False, "off": True}.get(config.logging.progress_bar)  # None: on a terminal
        progress = tqdm(
            total=sum(parameter.nbytes for _, parameter in targets),
            desc=f"loading {Path(folder).name}",
            unit="B",
            unit_scale=True,
            disable=wanted if torch.distributed.get_rank() == 0 else True,
        )
        with progress, torch.no_grad():
            for name, parameter in targets:
                weight = weights[name]
                sources = [files[source] for source in weight.hf]
                weight.layout.merge_into(parameter, sources, model, shard)
                progress.update(parameter.nbytes)
