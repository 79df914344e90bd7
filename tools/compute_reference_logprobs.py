"""Compute the reference log-probs of a dataset alone: what training does before its first step.

    torchrun --nproc-per-node 8 tools/compute_reference_logprobs.py --load-hf MODEL --data-path PREFIX …

Takes the flags of pretrain_longpo.py; those of the optimizer change nothing. The result goes beside the dataset (or to
--reference-dir); every run with the same weights, dataset, number format, reference RoPE base and window reuses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_longpo.command import run_command
from megatron_longpo.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from megatron_longpo.data.dataset import PreferenceDataset


def compute(config: RunConfig, dataset: PreferenceDataset) -> None:
    """Load the reference weights and evaluate every document."""
    from megatron_longpo.model.build import build_model
    from megatron_longpo.training.checkpoint import Checkpointer
    from megatron_longpo.training.distributed import is_rank_0
    from megatron_longpo.training.initial import load_initial_state
    from megatron_longpo.training.reference import check_reference_folder, reference_folder, reference_logprobs

    if not config.objective.needs_reference:
        raise ConfigError(f"--objective {config.objective.objective} has no reference model: nothing to compute")
    check_reference_folder(config)
    chunks = build_model(config)
    load_initial_state(config, Checkpointer(config, chunks))
    _, fingerprint = reference_logprobs(config, dataset, chunks, None)
    if is_rank_0():
        folder = reference_folder(config)
        print(f"reference log-probs of {len(dataset)} documents under weights {fingerprint} are in {folder}")


if __name__ == "__main__":
    run_command(compute)
