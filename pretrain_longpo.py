"""Train a language model from short to long context by LongPO (arXiv 2502.13922) on Megatron-Core.

    torchrun --nproc-per-node 8 pretrain_longpo.py --load-hf MODEL --data-path PREFIX --load OUT --save OUT --bf16 …

`--help` lists all flags, `--config FILE.yaml` reads them from a file. tools/preprocess_pairs.py writes the data.
With `--load OUT --save OUT` the same command starts a run and goes on where it stopped. `--dry-run --num-gpus 64`
behind the same flags prints the memory that they need, on any machine and in one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_longpo.command import run_command
from megatron_longpo.config import RunConfig

if TYPE_CHECKING:
    from megatron_longpo.data.dataset import PreferenceDataset


def train(config: RunConfig, dataset: PreferenceDataset) -> None:
    """Build everything that this rank needs and train."""
    from megatron_longpo.training.loop import Trainer
    from megatron_longpo.training.outputs import own_outputs

    with own_outputs(config):
        Trainer(config, dataset).train()


def dry_run(config: RunConfig) -> None:
    """Print the peak memory of the run."""
    from megatron_longpo.planning.dry_run_command import print_dry_run

    print_dry_run(config)


# Megatron's checkpoint writer starts processes that import this file again.
if __name__ == "__main__":
    run_command(train, dry_run)
