"""What the commands under torchrun share: parse, prepare, start the ranks, speak plainly of mistakes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_longpo.arguments import parse_command_line, print_errors
from megatron_longpo.config import ConfigError, RunConfig
from megatron_longpo.processes import end, is_rank, leave, one_voice_on_ctrl_c, take_ctrl_c_once

if TYPE_CHECKING:  # `--help` and mistakes in flags do not wait for torch
    from megatron_longpo.data.dataset import PreferenceDataset

    Job = Callable[[RunConfig, PreferenceDataset], None]


def run_command(job: Job, dry_run: Callable[[RunConfig], None] | None = None) -> None:
    """Run a job on this rank with the configuration of the command line; the process group is up inside.

    ``dry_run`` takes its place with ``--dry-run``, without data and process group.
    A mistake of the user ends in a message without a traceback: exit code 2 for flags, 1 for everything else. Ctrl-C
    ends in one of rank 0, with exit code 130.
    """
    take_ctrl_c_once()
    try:
        config = parse_command_line()
        with one_voice_on_ctrl_c(_say_interrupted):
            _run(job, dry_run, config)
    except ConfigError as error:
        mistakes = error
        leave(2, lambda: print_errors(mistakes))
    except (ValueError, OSError, FloatingPointError) as error:
        rank = os.environ.get("RANK", "0")
        message = f"{os.path.basename(sys.argv[0])}: error{'' if rank == '0' else f' (rank {rank})'}: {error}"
        leave(1, lambda: print(message, file=sys.stderr))
    except KeyboardInterrupt:
        end(130)
    except Exception:
        if not is_rank():
            raise
        traceback.print_exc()
        end(1)


def _say_interrupted() -> None:
    program = os.path.basename(sys.argv[0])
    print(
        f"{program}: interrupted; what is on disk stays, the same command goes on with it", file=sys.stderr, flush=True
    )


def _run(job: Job, dry_run: Callable[[RunConfig], None] | None, config: RunConfig) -> None:
    if config.planning.dry_run:
        if dry_run is None:
            raise ConfigError("--dry-run is for pretrain_longpo.py: this command has none")
        return dry_run(config)

    from megatron_longpo.training.distributed import process_groups
    from megatron_longpo.training.prepare import open_dataset, prepared

    config = prepared(config)
    dataset = open_dataset(config)
    with process_groups(config):
        job(config, dataset)
