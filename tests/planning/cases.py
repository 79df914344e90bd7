"""A small run whose memory can be measured for real."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import RunConfig
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.planning.ledger import MemoryLedger
from megatron_longpo.planning.measured_step import MeasuredTrainer
from megatron_longpo.planning.parts import Part
from megatron_longpo.planning.workload import batch_of, made_up_rows
from megatron_longpo.validation import validate

MODEL = (
    "--data-path x --num-layers 4 --hidden-size 128 --ffn-hidden-size 320 --num-attention-heads 8 "
    "--group-query-attention --num-query-groups 4 --swiglu --disable-bias-linear --vocab-size 1000 "
    "--untie-embeddings-and-output-weights --train-iters 9 --use-cpu --seq-length 512 --logits-chunk-tokens 100 "
    "--max-position-embeddings 512 "
)
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
"""config.json of that model."""
WINDOW = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}
"""What makes it one with a sliding window."""
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def run_config(words: str = "", world_size: int = 1) -> RunConfig:
    """The run with some more flags, validated."""
    config = parse_arguments((MODEL + words).split()).with_device_defaults("local", "gloo")
    validate(config, world_size)
    return config


def rows_of(config: RunConfig) -> list[TrainingRow]:
    """Its longest micro-batch: two turns with answers of 20 tokens."""
    return made_up_rows(config, 2, 20)


def measure_real_step(
    config: RunConfig,
    world_size: int,
    cp_rank: int = 0,
    around: Callable[[MemoryLedger], AbstractContextManager[None]] = lambda ledger: nullcontext(),
) -> tuple[dict[Part, int], MeasuredTrainer]:
    """The ledger's peak over a step with real tensors; Megatron's parallel state must be up."""
    batch = batch_of(config, rows_of(config), cp_rank)
    ledger = MemoryLedger()
    with around(ledger), ledger:
        trainer = MeasuredTrainer(config, ledger)
        trainer.allocate_optimizer_state()
        trainer.measure([batch] * config.num_microbatches(world_size))
    return ledger.device.peak, trainer


def words_of(command: str) -> list[str]:
    """What a shell makes of the part behind the script's name."""
    lines = command.replace("\\\n", " ").partition("pretrain_longpo.py")[2]
    return shlex.split(lines.removesuffix("END"))
