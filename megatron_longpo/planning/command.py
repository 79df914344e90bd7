"""A layout as something to paste into a shell: ``torchrun`` on one node, ``sbatch`` on several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

WIDTH = 110


def launch_command(words: Sequence[str], num_gpus: int, gpus_per_node: int) -> str:
    """The command that starts ``pretrain_longpo.py`` with these words on this many GPUs."""
    # torchrun gives every process one thread; an optimizer on the host needs its share of the cores.
    threads = f"OMP_NUM_THREADS=$(($(nproc --all) / {min(num_gpus, gpus_per_node)}))"
    hosted = "--optimizer-cpu-offload" in words
    if num_gpus <= gpus_per_node:
        start = [threads] if hosted else []
        return _wrapped([*start, "torchrun", "--nproc-per-node", str(num_gpus), "pretrain_longpo.py"], words)
    nodes = -(-num_gpus // gpus_per_node)
    # Expanded on the first node, where the batch script runs.
    rendezvous = '--rdzv-backend c10d --rdzv-endpoint "$(hostname):29500"'
    torchrun = f"srun torchrun --nnodes {nodes} --nproc-per-node {gpus_per_node} {rendezvous}"
    script = _wrapped([torchrun, "pretrain_longpo.py"], words)
    if hosted:
        script = f"export {threads}\n{script}"
    return (
        f"sbatch --nodes {nodes} --ntasks-per-node 1 --gpus-per-node {gpus_per_node} <<'END'\n"
        f"#!/bin/bash\n{script}\nEND"
    )


def _wrapped(start: Sequence[str], words: Sequence[str]) -> str:
    """Flags with their values on lines of at most `WIDTH` columns."""
    flags: list[str] = []
    for word in words:
        if word.startswith("--"):
            flags.append(word)
        else:
            flags[-1] += " " + shlex.quote(word)
    lines = [" ".join(start)]
    for flag in flags:
        if len(lines[-1]) + len(flag) + 3 > WIDTH:
            lines.append("   ")
        lines[-1] += " " + flag
    return " \\\n".join(lines)
