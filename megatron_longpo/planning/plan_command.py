"""``tools/plan_run.py``: from a model, a length and a number of GPUs to ranked layouts and a command."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

from megatron_longpo.config import ConfigError, ModelConfig
from megatron_longpo.config.field import AUTO
from megatron_longpo.config.flags import show
from megatron_longpo.conversion.hf_config import CONFIG_FILE, HFModel, read_hf_folder, read_hf_model
from megatron_longpo.conversion.hf_weights import HFWeights
from megatron_longpo.planning.hardware import GPU, gpu_named
from megatron_longpo.planning.launch_command import launch_command
from megatron_longpo.planning.search import Plan, find_plans
from megatron_longpo.planning.tables import cost_line, memory_table, plans_table, rows_line, time_table
from megatron_longpo.planning.timed_layouts import HOST_GAIN, Search
from megatron_longpo.planning.workload import made_up_rows
from megatron_longpo.validation import nearest_multiple

TOKENS_MULTIPLE = 256
"""Rows that are no multiple of 2 · 16 CP · 8 TP would leave out most layouts, and say nothing of it."""


HOST_NOTE = (
    "offloading has not been measured on a GPU: what uses the host comes first where it is predicted to be\n"
    f"{HOST_GAIN:g} times as fast as what does not; --host-mem-gib 0 plans without it"
)


def print_plan(arguments: Namespace) -> None:
    """Find the layouts, print them and the winner's times, memory, cost and command.

    Raises:
        ConfigError: Unknown GPU, no possible layout, or none that fits.
        ValueError: The model's config.json cannot be read.
    """
    nearest = nearest_multiple(arguments.seq_length, TOKENS_MULTIPLE)
    if arguments.seq_length != nearest:
        raise ConfigError(
            f"--seq-length {arguments.seq_length} must be a multiple of {TOKENS_MULTIPLE} here, so that a row divides "
            f"over context- and tensor-parallel ranks; nearest: {nearest}"
        )
    search = search_of(arguments)
    gpu = search.gpu
    plans = find_plans(search)
    best = plans[0]
    rows = made_up_rows(best.candidate.config, search.num_turns, search.response_tokens)
    print(f"{search.num_gpus} × {gpu.name}, {arguments.objective}, {rows_line(rows, made_up=True)}")
    if note := best.candidate.config.window_note:
        print(note)
    print("\n" + plans_table(plans, search.num_gpus))
    print(f"\nTime of the first, {best.time.seconds:.1f} s per step of {best.time.documents} documents\n")
    print(time_table(best.time))
    print("\nPeak memory of the first\n")
    print(memory_table(best.memory, gpu))
    if any(plan.host_gib for plan in plans):
        print(HOST_NOTE)
    print("\n" + cost_line(best.time, arguments.num_documents))
    if missing := missing_model(arguments):
        print("\n" + missing)
    print("\n" + command_of(best, gpu))


def search_of(arguments: Namespace) -> Search:
    """What the command line asks for."""
    source = _source(Path(arguments.hf_model))
    if arguments.window_size is not None:
        source.family.refuse_window(dataclasses.replace(source.model, window_size=arguments.window_size))
    return Search(
        base=base_words(arguments, source.model),
        model=source.model,
        source=f"--hf-model {arguments.hf_model}",
        num_gpus=arguments.num_gpus,
        gpu=_gpu(arguments),
        num_turns=arguments.turns_per_document,
        response_tokens=arguments.response_tokens,
        num_plans=arguments.num_plans,
    )


def command_of(plan: Plan, gpu: GPU) -> str:
    """The command that starts a plan."""
    return launch_command(plan.candidate.words, plan.time.num_gpus, gpu.gpus_per_node)


def missing_model(arguments: Namespace) -> str | None:
    """What the printed command will not find in its ``--load-hf`` folder, None where all is there.

    A plan needs no more than the model's shape.
    """
    folder = _folder(arguments)
    try:
        read_hf_model(folder)
        HFWeights(folder).release()
    except ValueError as error:
        return f"First download the model, `hf download NAME --local-dir {folder}`: {error}"
    return None


def _folder(arguments: Namespace) -> Path:
    """The model's folder: that of its config.json, or for one of another name the folder of that name."""
    path = Path(arguments.hf_model)
    if not path.is_file():
        return path
    return path.parent if path.name == CONFIG_FILE else path.with_suffix("")


def _gpu(arguments: Namespace) -> GPU:
    gpu = gpu_named(
        arguments.gpu,
        arguments.peak_tflops,
        arguments.mem_gib,
        arguments.link_gbs,
        arguments.gpus_per_node,
        arguments.host_link_gbs,
        arguments.host_mem_gib,
    )
    gpu.refuse_backend(arguments.attention_backend)
    return gpu.with_rates(arguments.matmul_tflops, arguments.attention_tflops)


def base_words(arguments: Namespace, model: ModelConfig) -> list[str]:
    """The flags that all layouts share, for a model of this shape."""
    words = ["--load-hf", str(_folder(arguments)), "--data-path", arguments.data_path]
    words += ["--objective", arguments.objective]
    words += ["--seq-length", str(arguments.seq_length)]
    # Rows that are shorter than the model's own length are no reason to export a shorter model.
    if arguments.seq_length > model.max_position_embeddings:
        words += ["--max-position-embeddings", str(arguments.seq_length)]
    if arguments.rotary_base is not None:
        words += ["--rotary-base", arguments.rotary_base]
    if arguments.window_size is not None:
        words += ["--window-size", show(arguments.window_size)]
    words += ["--global-batch-size", str(arguments.global_batch_size), "--bf16"]
    if arguments.attention_backend != AUTO:
        words += ["--attention-backend", arguments.attention_backend]
    return [*words, "--save", arguments.save, "--load", arguments.save]


def _source(path: Path) -> HFModel:
    """The model in a Hugging Face folder or in a config.json of any name."""
    if not path.exists():
        raise ConfigError(
            f"--hf-model {path} does not exist: give a Hugging Face folder or a config.json; "
            "`hf download NAME config.json --local-dir FOLDER` makes one that is enough for a plan"
        )
    if path.is_dir() or path.name == CONFIG_FILE:
        return read_hf_folder(path if path.is_dir() else path.parent)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / CONFIG_FILE
        shutil.copy(path, copy)
        try:
            return read_hf_folder(folder)
        except ValueError as error:
            raise ConfigError(str(error).replace(str(copy), str(path))) from error
