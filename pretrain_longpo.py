"""Train a language model from short to long context by LongPO (arXiv 2502.13922) on Megatron-Core.

    torchrun --nproc-per-node 8 pretrain_longpo.py --load-hf MODEL --data-path PREFIX --save OUT --train-iters 1000 …

`--help` lists all flags, `--config FILE.yaml` gives them from a file. The data comes from tools/preprocess_pairs.py.
The same command, given `--load OUT` too, goes on where it stopped.
"""

import os
import sys

from megatron_longpo.arguments import parse_command_line, print_errors
from megatron_longpo.config import ConfigError, RunConfig


def train(config: RunConfig) -> None:
    """Build everything a run needs on this rank and train."""
    from megatron_longpo.training.distributed import initialize, shut_down
    from megatron_longpo.training.loop import Trainer
    from megatron_longpo.training.prepare import open_dataset, prepared

    config = prepared(config)
    dataset = open_dataset(config)
    initialize(config)
    try:
        Trainer(config, dataset).train()
    finally:
        shut_down()


def main() -> None:
    """Parse, train, and turn a user's mistake into a message without a traceback."""
    config = parse_command_line()
    try:
        train(config)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print_errors(error)
        sys.exit(2)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        rank = os.environ.get("RANK", "0")
        print(f"pretrain_longpo.py: error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        sys.exit(1)


# Megatron's checkpoint writer starts processes that import this file again.
if __name__ == "__main__":
    main()
