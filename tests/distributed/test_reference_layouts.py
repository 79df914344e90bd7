"""The reference pass under parallel layouts writes what one process writes, and the fingerprint is the same too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.distributed.harness import fresh_world, run_ranks
from tests.distributed.one_step import save_random_model
from tests.tiny import MODEL_FLAGS, write_tiny_dataset

LAYOUTS = {
    "TP 2 x CP 2": ["--tensor-model-parallel-size=2", "--context-parallel-size=2", "--sequence-parallel"],
    "CP 2": ["--context-parallel-size=2"],
    "PP 2": ["--pipeline-model-parallel-size=2"],
}
OBJECTIVES = {"short": ["--objective=longpo"], "long-independent": ["--objective=dpo", "--turns=independent"]}
PASSES = {
    2: [("CP 2", "short"), ("PP 2", "long-independent")],
    4: [("TP 2 x CP 2", "short"), ("PP 2", "long-independent")],
}
"""By the number of processes; data parallelism fills the rest."""


def compute(rank: int, runs: list[tuple[list[str], str]], folder: str) -> list[str]:
    """Compute the sidecar of every run into a folder of its own; returns the fingerprints."""
    from megatron_longpo import platform
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.data.dataset import PreferenceDataset
    from megatron_longpo.model.build import build_model
    from megatron_longpo.training.checkpoint import Checkpointer
    from megatron_longpo.training.checkpoint_folder import find_checkpoint
    from megatron_longpo.training.distributed import initialize, shut_down
    from megatron_longpo.training.reference import reference_logprobs

    if rank > 0:
        remember_what_is_missing()
    fingerprints, world = [], dist.get_world_size()
    for number, (flags, place) in enumerate(runs):
        fresh_world(f"{folder}/rendezvous-{world}-{number}", rank, world)
        common = [*MODEL_FLAGS, f"--data-path={folder}/tiny", "--seq-length=512", "--progress-bar=off"]
        config = parse_arguments([*common, f"--reference-dir={place}", *flags])
        config = config.with_device_defaults(*platform.device_defaults())
        initialize(config)
        chunks = build_model(config)
        start = find_checkpoint(f"{folder}/start")
        assert start is not None
        Checkpointer(config, chunks).load(start, weights_only=True)
        fingerprints.append(reference_logprobs(config, PreferenceDataset(f"{folder}/tiny"), chunks, None)[1])
        shut_down()
    return fingerprints


def remember_what_is_missing() -> None:
    """Let this rank have the memory of a network file system: a name that was not there stays away for a minute."""
    from megatron_longpo.training import distributed

    missing: set[Path] = set()
    exists = Path.exists

    def remembered(path: Path, **kwargs: Any) -> bool:
        if missing & {path, *path.parents}:
            return False
        if exists(path, **kwargs):
            return True
        missing.add(next(part for part in (*reversed(path.parents), path) if not exists(part)))
        return False

    Path.exists = remembered  # type: ignore[method-assign]
    distributed._LATEST_S = 0.5


def save_model_and_compute(rank: int, runs: list[tuple[list[str], str]], folder: str) -> list[str]:
    """`compute` in one process, from a new model."""
    save_random_model(rank, f"{folder}/tiny", f"{folder}/start", MODEL_FLAGS)
    return compute(rank, runs, folder)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def sidecars(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, num_ranks = tmp_path_factory.mktemp("reference"), request.param
    # More documents than a group of the pass, and not a multiple of it.
    write_tiny_dataset(folder / "tiny", num_documents=11)
    singles = [(flags, f"{folder}/one") for flags in OBJECTIVES.values()]
    layouts = [([*OBJECTIVES[kind], *LAYOUTS[name]], f"{folder}/{name}") for name, kind in PASSES[num_ranks]]
    prints = run_ranks(save_model_and_compute, 1, singles, str(folder))[0]
    prints += [p for rank in run_ranks(compute, num_ranks, layouts, str(folder)) for p in rank]
    return {"folder": folder, "num_ranks": num_ranks, "fingerprints": prints}


def test_one_fingerprint_for_all_layouts(sidecars: dict[str, Any]) -> None:
    assert len(sidecars["fingerprints"]) == 2 + sidecars["num_ranks"] * 2
    assert len(set(sidecars["fingerprints"])) == 1


def test_layouts_write_what_one_process_writes(sidecars: dict[str, Any]) -> None:
    for layout, kind in PASSES[sidecars["num_ranks"]]:
        theirs, ours = (Path(sidecars["folder"], place, f"tiny.reference-{kind}") for place in ("one", layout))
        assert np.array_equal(np.load(ours / "lengths.npy"), np.load(theirs / "lengths.npy"))
        expected = np.load(theirs / "logps.npy")
        np.testing.assert_allclose(np.load(ours / "logps.npy"), expected, rtol=1e-5, atol=1e-5, err_msg=layout)
        assert expected.std() > 0.5 and (expected < 0).all()
