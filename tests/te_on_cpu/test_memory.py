"""A dry run with Megatron-Core's layers tells the memory of Transformer Engine's, to the byte."""

from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist

from megatron_longpo.config import RunConfig
from megatron_longpo.planning import dry_run
from megatron_longpo.planning.parts import Part
from megatron_longpo.planning.replaced import replaced
from tests.distributed.harness import run_ranks
from tests.planning.cases import FULL, rows_of, run_config
from tests.te_on_cpu import FOLDER, environment

CUBLAS_WORKSPACE = 32 * 2**20 + 1024
"""Bytes that Transformer Engine holds for cuBLAS on Hopper; torch's own is part of what the planner leaves free."""
PIECE = 64 * 128 * 2
"""Bytes of the gathered hidden states of a piece."""


def own_peaks(rank: int, cases: list[tuple[str, int]]) -> list[tuple[dict[Part, int], dict[Part, int]]]:
    """Of flags and numbers of ranks, the peak bytes by part with the layers of each."""
    from transformer_engine.pytorch.cpp_extensions.gemm import get_cublas_workspace

    dist.destroy_process_group()
    megatrons = dry_run._for_fake_world

    def transformer_engines(config: RunConfig) -> RunConfig:
        config = megatrons(config)
        training = dataclasses.replace(config.training, transformer_impl="transformer_engine")
        return dataclasses.replace(config, training=training)

    def peaks(words: str, world_size: int, prepare: object) -> dict[Part, int]:
        get_cublas_workspace.cache_clear()
        config = run_config(words, world_size)
        with replaced(dry_run, "_for_fake_world", prepare):
            return dry_run.dry_run_stage(config, world_size, 0, rows_of(config)).own_peaks

    return [(peaks(*case, megatrons), peaks(*case, transformer_engines)) for case in cases]


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no wheel of transformer-engine in {FOLDER}: make install")
def test_dry_runs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    kept = f"{FULL} --recompute-keep-attention --mlp-chunk-tokens 64 --projection-chunk-tokens 64"
    sequence_parallel = "--bf16 --global-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel"
    cases = [
        ("--bf16 --global-batch-size 2", 1),
        (f"--bf16 --global-batch-size 2 {kept}", 1),
        (sequence_parallel, 4),
        (f"{sequence_parallel} {kept}", 4),
        ("--bf16 --global-batch-size 4 --pipeline-model-parallel-size 2 --context-parallel-size 2", 4),
    ]
    for (words, _), (megatrons, theirs) in zip(cases, run_ranks(own_peaks, 1, cases)[0], strict=True):
        other = {part: megatrons[part] for part in (Part.ACTIVATIONS, Part.COMMUNICATION)}
        other[Part.ACTIVATIONS] += CUBLAS_WORKSPACE
        if kept in words and sequence_parallel in words:
            # Megatron-Core keeps the buffer that it gathers every piece into.
            other[Part.COMMUNICATION] -= PIECE
        assert theirs == megatrons | other, words
