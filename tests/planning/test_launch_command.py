"""Launch commands: a shell and the trainer make of them what the planner meant."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import ModelConfig
from megatron_longpo.planning import plan_command
from megatron_longpo.planning.launch_command import launch_command
from megatron_longpo.planning.layouts import candidates
from megatron_longpo.planning.plan_command import search_of
from megatron_longpo.training.initial import with_initial_model
from megatron_longpo.validation import validate
from tests.planning.cases import HF_CONFIG, WINDOW, words_of
from tools import plan_run


def test_several_nodes_get_a_batch_script_with_the_same_words() -> None:
    words = ["--load-hf", "models/my model", "--bf16", *(f"--flag-{n}" for n in range(30))]
    command = launch_command(words, 16, 8)
    memory = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    start = "sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --exclusive --mem 0 <<'END'\n#!/bin/bash\n"
    cache = "TRITON_CACHE_DIR=${TMPDIR:-/tmp}/triton-$SLURM_JOB_ID"
    srun = "srun --kill-on-bad-exit=1 --cpu-bind=none"
    assert command.startswith(f"{start}export {memory}\nexport {cache}\n{srun} \\\n    torchrun")
    assert words_of(command) == words
    assert words_of(launch_command(words, 4, 8)) == words
    for num_gpus in (4, 4096):
        assert max(map(len, launch_command(words, num_gpus, 8).splitlines())) <= 112
    hosted = [*words, "--optimizer-cpu-offload"]
    threads = "OMP_NUM_THREADS=$(($(nproc --all) / {}))"
    assert launch_command(hosted, 4, 8).startswith(f"{memory} {threads.format(4)} \\\ntorchrun")
    exports = f"export {memory}\nexport {threads.format(8)}\nexport {cache}\nsrun"
    assert f"\n{exports}" in launch_command(hosted, 16, 8)
    for split in (["--sequence-parallel"], ["--context-parallel-size", "2"]):
        started = launch_command([*words, *split], 4, 8)
        assert started.startswith(f"{memory} CUDA_DEVICE_MAX_CONNECTIONS=1 \\\ntorchrun")
    assert words_of(launch_command(hosted, 16, 8)) == hosted


LAUNCHERS = """
SLURM_JOB_ID=1
torchrun() { printf '%s\\0' "$@"; }
srun() { while [[ $1 == --* ]]; do shift; done; "$@"; }
sbatch() { shift $#; source /dev/stdin; }
"""
"""What starts programs on nodes, here as functions and a variable of the shell."""


def shell_words(command: str) -> list[str]:
    """The words that bash gives to torchrun."""
    done = subprocess.run(["bash", "-euc", LAUNCHERS + command], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("num_gpus", [4, 16])
def test_a_shell_hands_the_trainer_every_word_as_it_is(num_gpus: int) -> None:
    words = ["--load-hf", 'models/my $HOME\'s "7B" `id` \\ *', "--sequence-parallel", "--optimizer-cpu-offload"]
    started = shell_words(launch_command([*words, "--data-path", "END"], num_gpus, 8))
    number = started.index("pretrain_longpo.py")
    assert started[number + 1 :] == [*words, "--data-path", "END"]
    ranks = dict(itertools.pairwise(started[:number]))
    assert int(ranks.get("--nnodes", 1)) * int(ranks["--nproc-per-node"]) == num_gpus
    assert num_gpus == 4 or ranks["--rdzv-endpoint"] == f"{socket.gethostname()}:29500"


def test_a_command_names_the_folder_of_the_model_and_what_is_not_in_it(model: Path) -> None:
    other = model / "llama-70b.json"
    other.write_text((model / "config.json").read_text())

    def planned(path: Path) -> tuple[str, str | None]:
        arguments = plan_run.parser().parse_args(f"--hf-model {path} --seq-length 16384 --num-gpus 1 --gpu x".split())
        words = plan_command.base_words(arguments, ModelConfig())
        return words[words.index("--load-hf") + 1], plan_command.missing_model(arguments)

    for path, folder, missing in (
        (model, model, "holds no weights"),
        (model / "config.json", model, "holds no weights"),
        # Beside it lie the config.json and the weights of another model.
        (other, model / "llama-70b", "config.json is missing"),
    ):
        named, said = planned(path)
        assert named == str(folder)
        assert said is not None and "\n" not in said and missing in said and f"--local-dir {folder}`" in said
    save_file({"x": torch.zeros(1)}, model / "model.safetensors")
    assert planned(model)[1] is None


def test_a_model_that_can_do_more_than_the_rows_ask_for_stays_as_long_as_it_is(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(HF_CONFIG | {"max_position_embeddings": 131072}))

    def length(seq_length: int) -> int:
        arguments = f"--hf-model {model} --seq-length {seq_length} --num-gpus 1 --gpu a100-80gb".split()
        search = search_of(plan_run.parser().parse_args(arguments))
        return with_initial_model(parse_arguments(search.base)).model.max_position_embeddings

    assert [length(tokens) for tokens in (65536, 131072, 262144)] == [131072, 131072, 262144]


TIED = {"tie_word_embeddings": True, "num_key_value_heads": 2}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--num-gpus 1 --gpu a100-80gb"),
        (WINDOW, "--num-gpus 1 --gpu a100-80gb"),
        (WINDOW, "--num-gpus 1 --gpu a100-80gb --window-size full"),
        ({}, "--num-gpus 6 --gpu b200-192gb --gpus-per-node 6 --global-batch-size 6 --objective dpo"),
        (TIED, "--num-gpus 16 --gpu h100-80gb --attention-backend fused --seq-length 65536"),
        (QWEN3, "--num-gpus 32 --gpu h200-141gb --objective sft-chosen --rotary-base 1e7 --global-batch-size 4"),
    ],
)
def test_the_trainer_takes_the_command_of_every_kind_of_layout(
    changes: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    (model / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    arguments = plan_run.parser().parse_args(f"--hf-model {model} --seq-length 16384 {words}".split())
    search = search_of(arguments)
    legal = list(candidates(search.base, search.model, search.num_gpus, search.gpu.gpus_per_node, search.source))
    settings = tmp_path / "more.yaml"
    settings.write_text("lr: 1.0e-6\n")
    sizes = {(one.config.parallel, one.option.on_host): one for one in legal}
    # A shell and a parser for each: a few of every kind are enough.
    for one in list(sizes.values())[:: max(1, len(sizes) // 8)]:
        started = shell_words(launch_command(one.words, search.num_gpus, search.gpu.gpus_per_node))
        flags = started[started.index("pretrain_longpo.py") + 1 :]
        config = with_initial_model(parse_arguments([*flags, "--config", str(settings)]))
        config = config.with_device_defaults("local", "nccl")
        validate(config, search.num_gpus)
        assert config.parallel == one.config.parallel and config.optimizer.lr == 1e-6
        assert config.training == one.config.training and config.model == one.config.model
