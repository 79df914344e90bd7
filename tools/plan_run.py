"""Plan a run without its GPUs: ranked parallel layouts, their memory and time, and the command of the best.

    python tools/plan_run.py --hf-model models/llama-3.1-70b \\
        --seq-length 131072 --num-gpus 64 --gpu h100-80gb

Memory is measured: each layout's training step runs on fake tensors at the real world size. Time is predicted from
stated rates; docs/performance.md has the formulas, their sources, and how far they are from published results.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_longpo.config import ConfigError
from megatron_longpo.config.field import AUTO
from megatron_longpo.config.flags import FLAGS
from megatron_longpo.help_format import HelpFormatter, number_above_0, number_at_least_0, window_size
from megatron_longpo.processes import plain_ending


def whole_number(text: str) -> int:
    """A number of things, at least one."""
    if text.lower().removesuffix("k").isdigit() and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number: {int(text[:-1]) * 1024}")
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def rotary_base(text: str) -> str:
    """A RoPE base, as it goes into the command."""
    if number_at_least_0(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be greater than 1")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = made.add_argument
    add("--hf-model", required=True, metavar="PATH", help="Hugging Face folder, or its config.json")
    add(
        "--seq-length",
        type=whole_number,
        required=True,
        metavar="TOKENS",
        help="longest conversation, a multiple of 256",
    )
    add("--num-gpus", type=whole_number, required=True, metavar="GPUS", help="a part of a node, or whole nodes")
    add("--gpu", required=True, help="h100-80gb, h200-141gb, a100-80gb, a800-80gb, b200-192gb, or a name of your own")
    add("--gpus-per-node", type=whole_number, metavar="GPUS", help="GPUs that share NVLink (default: 8)")
    objectives = FLAGS["objective"].info.choices or ()
    add("--objective", default="longpo", choices=objectives, metavar="NAME", help=", ".join(objectives))
    add("--global-batch-size", type=whole_number, default=8, metavar="DOCUMENTS", help="documents in one step")
    add("--turns-per-document", type=whole_number, default=4, metavar="TURNS", help="questions about each document")
    add("--response-tokens", type=whole_number, default=512, metavar="TOKENS", help="length of every answer")
    add("--rotary-base", type=rotary_base, metavar="X", help="RoPE base to train with (default: the model's)")
    add(
        "--window-size",
        type=window_size,
        metavar="LEFT,0",
        help="sliding window to train with, as in the trainer: 4095,0 or full (default: the model's)",
    )
    add(
        "--num-documents",
        type=whole_number,
        default=45_000,
        metavar="DOCUMENTS",
        help="documents of the whole run, the paper's by default, for its GPU-hours and days (default: 45000)",
    )
    backends = FLAGS["attention_backend"].info.choices
    add("--attention-backend", default=AUTO, choices=backends, help="attention kernel")
    add("--num-plans", type=whole_number, default=3, metavar="N", help="layouts to measure and show")
    add("--data-path", default="data/pairs", metavar="PREFIX", help="dataset, for the printed command only")
    add("--save", default="runs/longpo", metavar="FOLDER", help="checkpoints, for the printed command only")
    rates = made.add_argument_group("rates, in place of the table's")
    rates.add_argument("--peak-tflops", type=number_above_0, metavar="TFLOP/S", help="dense bf16 peak of one GPU")
    rates.add_argument("--mem-gib", type=number_above_0, metavar="GIB", help="memory of one GPU")
    rates.add_argument(
        "--link-gbs", type=number_above_0, metavar="GB/S", help="network card of one GPU, in each direction"
    )
    rates.add_argument(
        "--host-mem-gib", type=number_at_least_0, metavar="GIB", help="host memory per GPU; 0 offloads nothing"
    )
    rates.add_argument(
        "--host-link-gbs", type=number_above_0, metavar="GB/S", help="PCIe of one GPU, in each direction"
    )
    rates.add_argument("--matmul-tflops", type=number_above_0, metavar="TFLOP/S", help="measured on matrix products")
    rates.add_argument(
        "--attention-tflops",
        type=number_above_0,
        nargs=2,
        metavar=("FORWARD", "BACKWARD"),
        help="measured on attention",
    )
    return made


def main() -> None:
    """Run the command line."""
    arguments = parser().parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan is the same on a machine with GPUs
    with plain_ending("plan_run.py"):
        # Imported here: Ctrl-C ends plainly from now on.
        from megatron_longpo.planning.plan_command import print_plan

        try:
            print_plan(arguments)
        except ConfigError as error:
            sys.exit("\n".join(f"plan_run.py: error: {line}" for line in error.errors))


if __name__ == "__main__":
    main()
