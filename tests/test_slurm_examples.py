"""The Slurm scripts, run as Slurm runs them; in place of vLLM a server of the same protocol is found on the PATH."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import MistralConfig

from megatron_longpo.pairs import read_pairs
from tests.data.conftest import huggingface_folder, text  # noqa: F401
from tests.generation.conftest import LENGTHS, NUM_DOCUMENTS, corpus  # noqa: F401
from tests.tiny import MODEL_FLAGS, write_tiny_dataset

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "examples" / "slurm"
SCRIPT = "examples/slurm/generate_pairs.sbatch"

VLLM_FLAGS = {
    "--served-model-name",
    "--host",
    "--port",
    "--tensor-parallel-size",
    "--gpu-memory-utilization",
    "--max-model-len",
    "--generation-config",
    "--chat-template",
    "--enable-prefix-caching",
}
"""Those that we use, of ``vllm serve`` as it is: others, such as ``--disable-log-requests``, are gone."""

VLLM = """#!{python}
import argparse, json, os, sys, urllib.request

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("command", choices=["serve"])
parser.add_argument("model")
for flag in {flags}:
    parser.add_argument(flag, **({{"action": "store_true"}} if flag == "--enable-prefix-caching" else {{}}))
call = vars(parser.parse_args())
call["config"] = json.load(open(call["model"] + "/config.json"))
try:
    urllib.request.urlopen(f"http://127.0.0.1:{{int(call['port']) - 1}}/v1/models")
    call["is_second"] = True
except OSError:
    call["is_second"] = False
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(call), file=calls)
words = ["--latency-ms", "20", "--model", call["served_model_name"], "--port", call["port"]]
os.execv(sys.executable, [sys.executable, "-m", "benchmarks.generation.chat_server", *words])
"""

SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done  # its own flags
exec "$@"
"""

TORCHRUN = """#!/bin/sh
echo "$@" >> "$CALLS"
exec {torchrun} "$@"
"""


@pytest.mark.slow
def test_two_elements_of_the_array_make_the_pairs(corpus: Path, huggingface_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text(VLLM.format(python=sys.executable, flags=sorted(VLLM_FLAGS)))
    vllm.chmod(0o755)
    model = tmp_path / "model"
    shutil.copytree(huggingface_folder, model)
    MistralConfig(max_position_embeddings=4096).save_pretrained(model)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in LENGTHS.items())
    environment = os.environ | {
        "PATH": f"{vllm.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "CALLS": str(tmp_path / "calls"),
        "MODEL": str(model),
        "DOCUMENTS": str(corpus),
        "OUTPUT": str(tmp_path / "pairs"),
        "LONG_ROPE_BASE": "1e7",
        "FLAGS": f"{flags} --no-progress",
        "SLURM_ARRAY_TASK_COUNT": "2",
        "TMPDIR": str(tmp_path / "scratch"),
    }

    def start(element: int) -> subprocess.Popen[str]:
        values = environment | {"SLURM_ARRAY_TASK_ID": str(element), "SLURM_JOB_ID": str(element + 2)}
        return subprocess.Popen(
            [SCRIPTS / "generate_pairs.sbatch"], cwd=REPOSITORY, env=values, stdout=subprocess.PIPE, text=True
        )

    (tmp_path / "scratch").mkdir()
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
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 6 and all(call["enable_prefix_caching"] for call in calls)
    for short, long in zip(calls[::2], calls[1::2], strict=True):
        # Of one GPU: the second server starts when the first one answers, and only whole documents get their room.
        assert (short["is_second"], short["max_model_len"]) == (False, "36864")
        assert (long["is_second"], long["max_model_len"]) == (True, str(131072 + 4096))
        bases = [MistralConfig(**call["config"]).rope_parameters["rope_theta"] for call in (short, long)]
        assert bases == [MistralConfig().rope_parameters["rope_theta"], 1e7]
        assert [call["config"]["max_position_embeddings"] for call in (short, long)] == [36864, 131072 + 4096]
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("file", ["docs/generation.md", "megatron_longpo/generation/flags.py", SCRIPT], ids=str)
def test_commands_give_vllm_only_flags_that_it_has(file: str) -> None:
    content = (REPOSITORY / file).read_text().replace("\\\\\n", " ").replace("\\\n", " ")
    commands = re.findall(r"^ *vllm serve .*", content, re.MULTILINE)
    given = {flag for command in commands for flag in re.findall(r"(?<=\s)--[a-z-]+", command)}
    assert {"--enable-prefix-caching", "--max-model-len", "--generation-config"} <= given <= VLLM_FLAGS


@pytest.mark.slow
def test_elements_of_the_array_train_one_after_the_other(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    environments = Path(sys.executable).parent
    for name, script in (("srun", SRUN), ("torchrun", TORCHRUN.format(torchrun=environments / "torchrun"))):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    data = write_tiny_dataset(tmp_path / "tiny")
    start, run = tmp_path / "start", tmp_path / "run"
    flags = [*MODEL_FLAGS, "--use-cpu", "--seq-length=512", "--train-iters=5", "--global-batch-size=2"]
    flags += [f"--data-path={data}", f"--save={run}", f"--load={run}", f"--metrics-jsonl={run}/metrics.jsonl"]
    flags += ["--objective=sft-chosen", "--split=100,0", "--num-workers=0", "--progress-bar=off"]
    environment = os.environ | {
        "PATH": f"{programs}:{environments}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NUM_NODES": "1",
    }

    def element(job: int, minutes_left: float, *more: str) -> subprocess.CompletedProcess[str]:
        end = int(time.time() + 60 * minutes_left)
        values = environment | {"SLURM_JOB_ID": str(job), "SLURM_JOB_END_TIME": str(end)}
        command = [SCRIPTS / "train.sbatch", *flags, *more]
        return subprocess.run(command, cwd=REPOSITORY, env=values, capture_output=True, text=True, timeout=120)

    def steps() -> list[int]:
        return [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    too_short = element(1, 10)
    assert too_short.returncode == 1 and "--time is shorter than MARGIN_MINS, 15 minutes" in too_short.stderr
    made = element(2, 60, "--train-iters=1", f"--save={start}", f"--load={start}", f"--metrics-jsonl={start}.jsonl")
    assert made.returncode == 0, made.stderr
    # Its weights count until the run has a checkpoint of its own.
    flags[: len(MODEL_FLAGS)] = [f"--pretrained-checkpoint={start}", "--use-checkpoint-args"]
    first = element(2, 25.5, "--exit-interval=3")
    assert first.returncode == 0, first.stderr
    assert steps() == [1, 2, 3]
    assert "--exit-duration-in-mins 10" in (tmp_path / "calls").read_text()
    for job in (3, 4):  # the rest, and one that finds nothing to do
        assert element(job, 60).returncode == 0
        assert steps() == [1, 2, 3, 4, 5]
