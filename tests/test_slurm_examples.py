"""The Slurm scripts, run as Slurm runs them; in place of vLLM a server of the same protocol is found on the PATH."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_longpo.pairs import read_pairs
from tests.data.conftest import huggingface_folder, text  # noqa: F401
from tests.generation.conftest import LENGTHS, NUM_DOCUMENTS, corpus  # noqa: F401

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "examples" / "slurm" / "generate_pairs.sbatch"

VLLM = """#!/bin/sh
echo "$@" >> "$CALLS"
while [ "$1" != --port ]; do shift; done
exec {python} -m benchmarks.generation.chat_server --latency-ms 20 --model model --port "$2"
"""


@pytest.mark.slow
def test_two_elements_of_the_array_make_the_pairs(corpus: Path, huggingface_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text(VLLM.format(python=sys.executable))
    vllm.chmod(0o755)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in LENGTHS.items())
    environment = os.environ | {
        "PATH": f"{vllm.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "CALLS": str(tmp_path / "calls"),
        "MODEL": str(huggingface_folder),
        "DOCUMENTS": str(corpus),
        "OUTPUT": str(tmp_path / "pairs"),
        "LONG_ROPE_BASE": "1e7",
        "FLAGS": f"{flags} --no-progress",
        "SLURM_ARRAY_TASK_COUNT": "2",
    }

    def start(element: int) -> subprocess.Popen[str]:
        values = environment | {"SLURM_ARRAY_TASK_ID": str(element)}
        return subprocess.Popen([SCRIPT], cwd=REPOSITORY, env=values, stdout=subprocess.PIPE, text=True)

    # Slurm's warning before the time is up: the work so far is kept.
    stopped = start(0)
    while not (tmp_path / "pairs" / "state" / "00000" / "replay.sqlite3").exists():
        assert stopped.poll() is None
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 143
    outputs = [start(element).communicate(timeout=120)[0] for element in range(2)]
    assert "task 0 of 2 is finished; the last one to finish writes pairs.jsonl" in outputs[0]
    assert "documents with pairs" in outputs[1]
    assert len(list(read_pairs(tmp_path / "pairs" / "pairs.jsonl"))) == NUM_DOCUMENTS
    calls = (tmp_path / "calls").read_text()
    assert '"rope_theta": 1e7' in calls and "--enable-prefix-caching" in calls
