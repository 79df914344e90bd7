"""Folders that nodes do not share are refused before anything is written there. Here each rank has its own disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import megatron_longpo.platform  # noqa: F401  before Megatron-Core  # isort: skip
import torch.distributed as dist

from megatron_longpo.config import RunConfig
from tests.distributed.harness import run_ranks


def refusals(rank: int, folder: str) -> list[str | None]:
    """What each check says on this rank, where the same path leads to another folder than on the others."""
    from megatron_longpo.training import distributed
    from megatron_longpo.training.initial import load_initial_state
    from megatron_longpo.training.outputs import own_outputs

    distributed._LATEST_S = 0.5
    node = Path(folder, f"node-{rank}")
    (node / "runs").mkdir(parents=True)
    os.chdir(node)
    if rank == 0:
        (node / "runs" / "iter_0000010").mkdir()
        (node / "runs" / "iter_0000010" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        (node / "runs" / "latest_checkpointed_iteration.txt").write_text("10")
    said: list[str | None] = []

    def note(check: object) -> None:
        try:
            check()  # type: ignore[operator]
            said.append(None)
        except ValueError as error:
            said.append(str(error))
        dist.barrier()

    def save(where: str) -> None:
        with own_outputs(RunConfig.from_flat_dict({"save": where})):
            pass

    note(lambda: save("new"))
    note(lambda: save(f"{folder}/common"))
    note(lambda: load_initial_state(RunConfig.from_flat_dict({"load": "runs"}), None))  # type: ignore[arg-type]
    note(lambda: distributed.require_shared(folder, "--reference-dir"))
    assert not list(node.glob("**/*.tmp")) and not list(Path(folder).glob("**/*.tmp"))
    return said


def test_folders_that_nodes_do_not_share_are_refused(tmp_path: Path) -> None:
    for new, common, load, reference in run_ranks(refusals, 2, str(tmp_path)):
        assert new is not None and new.startswith("--save new is another folder on ")
        assert "file system that all nodes share" in new
        assert load is not None and load.startswith("--load runs holds another checkpoint on ")
        assert common is None and reference is None
