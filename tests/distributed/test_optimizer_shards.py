"""Checkpoints to which every rank gives its shard of the optimizer's state are those that upstream gathers it for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_longpo.platform  # noqa: F401  before Megatron-Core  # isort: skip
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

from tests.distributed.harness import fresh_world, run_ranks
from tests.distributed.parallel_load import parallel_load
from tests.distributed.test_layouts import COMMON, CP, MODEL, PP, TP, load_tensors
from tests.tiny import write_tiny_dataset

OURS, UPSTREAM = "ours", "upstream"
OTHER = {OURS: UPSTREAM, UPSTREAM: OURS}
COMMON_HERE = [flag for flag in COMMON if flag not in ("--finetune", "--beta=0.5")]
FLAGS = [*MODEL, *COMMON_HERE, "--objective=sft-chosen", "--use-distributed-optimizer"]
SAVED = {2: [], 4: [TP, "--sequence-parallel"]}
"""By the number of processes, as all layouts here."""
LOADED = {2: {"TP 2": [TP]}, 4: {"DP 4": [], "PP 2": [PP], "TP 2 x CP 2": [TP, CP]}}


@contextlib.contextmanager
def method(name: str) -> Iterator[None]:
    """Ours, or upstream's in its place."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_longpo.training import checkpoint

    over_gloo = checkpoint._format() | {"distrib_optim_fully_reshardable_mem_efficient": True}
    with pytest.MonkeyPatch.context() as patch:
        if name == UPSTREAM:
            patch.setattr(checkpoint, "_format", lambda: dict(over_gloo))
            for each in ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"):
                patch.setattr(DistributedOptimizer, each, getattr(DistributedOptimizer, each).__wrapped__)
        yield


def trainer(flags: list[str], rendezvous: str, rank: int, world: int) -> Any:
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.training.distributed import initialize
    from megatron_longpo.training.loop import Trainer
    from megatron_longpo.training.prepare import open_dataset, prepared

    fresh_world(rendezvous, rank, world)
    config = prepared(parse_arguments(flags))
    dataset = open_dataset(config)
    initialize(config)
    return Trainer(config, dataset)


def states(optimizer: Any) -> list[torch.Tensor]:
    """What an optimizer keeps of this rank's shard, in one order."""
    found = []
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.optimizer.state[parameter]
            found += [parameter.detach(), *(torch.as_tensor(state[name]) for name in sorted(state))]
    return found


def save_and_load(rank: int, world: int, data: str, folder: str) -> dict[str, Any]:
    """Save after a step by both methods, and load each by the other one under other layouts."""
    from megatron_longpo.training.checkpoint import Checkpointer, Progress, _format
    from megatron_longpo.training.data import MicroBatches, training_batches
    from megatron_longpo.training.distributed import shut_down

    data_flag = f"--data-path={data}"
    run = trainer([*FLAGS, *SAVED[world], data_flag, f"--save={folder}/{OURS}"], f"{folder}/rendezvous", rank, world)
    run.sampler = run._sampler()
    run._step(next(training_batches(MicroBatches(run.config, run.dataset, None), run.sampler)))
    state = run.checkpointer._model_state()
    sharded = run.optimizer.sharded_state_dict(state, is_loading=False, metadata=_format())["param_state"]
    num_bytes = sum(tensor.data.nbytes for tensor in nested_values(sharded))
    own = sum(tensor.numel() for group in run.optimizer.optimizer.param_groups for tensor in group["params"])
    run.checkpointer.save(Progress(iteration=1))
    with method(UPSTREAM):
        for part in run.optimizer.chained_optimizers:
            part.data_parallel_group_gloo = part.data_parallel_group
        config = run.config.from_flat_dict(run.config.to_flat_dict() | {"save": f"{folder}/{UPSTREAM}"})
        Checkpointer(config, run.chunks, run.optimizer, run.scheduler).save(Progress(iteration=1))
    shut_down()

    loaded: dict[str, bool] = {}
    for name, layout in LOADED[world].items():
        found = {}
        for saved in (OURS, UPSTREAM):
            with method(OTHER[saved]), parallel_load():
                flags = [*FLAGS, *layout, data_flag, f"--load={folder}/{saved}"]
                again = trainer(flags, f"{folder}/rendezvous-{name}-{saved}", rank, world)
            found[saved] = states(again.optimizer)
            shut_down()
        assert len(found[OURS]) == len(found[UPSTREAM]) > 10
        loaded[name] = all(map(torch.equal, found[OURS], found[UPSTREAM]))
        assert any(len(x) > 1 and x.abs().max() > 0 for x in found[OURS][1::4])
    return {"bytes per weight": num_bytes / own, "loaded": loaded}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_files_and_loaded_state_equal_upstreams(world: int, tmp_path: Path) -> None:
    data = str(write_tiny_dataset(tmp_path / "data" / "tiny", num_documents=20))
    for rank in run_ranks(save_and_load, world, world, data, str(tmp_path)):
        # Weights, and two means of gradients, in fp32. Nothing of other ranks.
        assert rank["bytes per weight"] == 12
        assert rank["loaded"] == dict.fromkeys(LOADED[world], True)
    tensors = load_tensors({name: str(tmp_path / name) for name in (OURS, UPSTREAM)})
    ours, upstreams = tensors[OURS], tensors[UPSTREAM]
    assert ours.keys() == upstreams.keys() and sum(name.startswith("optimizer.state") for name in ours) > 20
    for name, tensor in upstreams.items():
        assert torch.equal(ours[name], tensor), name
