"""A layout as something to paste into a shell: ``torchrun`` on one node, ``sbatch`` on several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

WIDTH = 110


def launch_command(words: Sequence[str], num_gpus: int, gpus_per_node: int) -> str:
    """The command that starts ``pretrain_longpo.py`` with these words on this many GPUs."""
    environment = _environment(words, min(num_gpus, gpus_per_node))
    if num_gpus <= gpus_per_node:
        torchrun = f"torchrun --nproc-per-node {num_gpus}"
        return f"{' '.join(environment)} \\\n{_wrapped(torchrun, words)}"
    assert num_gpus % gpus_per_node == 0, (num_gpus, gpus_per_node)
    nodes = num_gpus // gpus_per_node
    # Slurm gives a task one core, and the memory that belongs to it, unless the job has its nodes for itself.
    slurm = f"--nodes {nodes} --ntasks-per-node 1 --gpus-per-node {gpus_per_node} --exclusive --mem 0"
    # Expanded on the first node, where the batch script runs.
    rendezvous = '--rdzv-backend c10d --rdzv-endpoint "$(hostname):29500"'
    # Without a word from the site, one node's processes would wait for those of another that has failed.
    srun = "srun --kill-on-bad-exit=1 --cpu-bind=none"
    torchrun = f"{srun} \\\n    torchrun --nnodes {nodes} --nproc-per-node {gpus_per_node} {rendezvous}"
    # Ranks that compile at once get in each other's way in a home that nodes share.
    environment.append("TRITON_CACHE_DIR=${TMPDIR:-/tmp}/triton-$SLURM_JOB_ID")
    script = "\n".join([*(f"export {setting}" for setting in environment), _wrapped(torchrun, words)])
    return f"sbatch {slurm} <<'END'\n#!/bin/bash\n{script}\nEND"


def _environment(words: Sequence[str], ranks_per_node: int) -> list[str]:
    # Rows are of ever new lengths, which breaks the allocator's fixed blocks into pieces.
    settings = ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
    if {"--sequence-parallel", "--context-parallel-size"} & set(words):
        # Kernels start in the order of their launches then, so that communication gets behind computation.
        settings.append("CUDA_DEVICE_MAX_CONNECTIONS=1")
    if "--optimizer-cpu-offload" in words:
        # torchrun gives every process one thread; an optimizer on the host needs its share of the cores.
        settings.append(f"OMP_NUM_THREADS=$(($(nproc --all) / {ranks_per_node}))")
    return settings


def _wrapped(torchrun: str, words: Sequence[str]) -> str:
    """The script and its flags with their values on lines of at most `WIDTH` columns."""
    flags: list[str] = []
    for word in words:
        if word.startswith("--"):
            flags.append(word)
        else:
            flags[-1] += " " + shlex.quote(word)
    lines = [torchrun]
    for flag in ["pretrain_longpo.py", *flags]:
        if len(lines[-1]) + len(flag) + 3 > WIDTH:
            lines.append("   ")
        lines[-1] += " " + flag
    return " \\\n".join(lines)
