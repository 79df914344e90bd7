"""Every layout that a run could have, as the command line that asks for it, judged by the trainer's own checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import ConfigError, ModelConfig, RunConfig
from megatron_longpo.planning.step_time import num_virtual
from megatron_longpo.validation import validate


@dataclass(frozen=True)
class MemoryOption:
    """A way to trade time for memory.

    Args:
        name: Short, for tables.
        flags: What it adds to the command line; ``{half}`` stands for half of the layers that recompute together.
    """

    name: str
    flags: tuple[str, ...]

    def words(self, num_local_layers: int) -> list[str]:
        """The flags for a number of layers per (virtual) pipeline stage."""
        return [word.format(half=max(1, num_local_layers // 2)) for word in self.flags]


MEMORY_OPTIONS = (
    MemoryOption("none", ()),
    MemoryOption("MLP", ("--recompute-granularity", "selective", "--recompute-modules", "mlp")),
    MemoryOption(
        "half the layers",
        ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "{half}"),
    ),
    MemoryOption(
        "all but attention",
        (
            *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
            "--recompute-keep-attention",
        ),
    ),
    MemoryOption(
        "all layers",
        ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ),
)
"""What the search tries on every layout. An entry is all that a new flag needs to take part."""

CP_COMM_TYPES = ("all_gather", "a2a", "p2p")

MAX_VIRTUAL_STAGES = 8
"""More model chunks per rank save little of a bubble that they have divided by 8 already."""


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Args:
        words: Its command line, behind the script's name.
        config: What the trainer makes of it; validated.
        option: The name of its memory option.
    """

    words: tuple[str, ...]
    config: RunConfig
    option: str


def candidates(
    base: Sequence[str], model: ModelConfig, num_gpus: int, gpus_per_node: int, source: str = "the model"
) -> Iterator[Candidate]:
    """All layouts on this many GPUs that the trainer accepts.

    Tensor parallelism stays within a node and always comes with sequence parallel, which costs nothing.

    Args:
        base: The flags that all of them share.
        model: The checkpoint's shape.
        num_gpus: Ranks.
        gpus_per_node: GPUs that share NVLink.
        source: Names the checkpoint in error messages.
    """
    for layout in _layouts(model, num_gpus, gpus_per_node):
        # Most layouts fall here, before the options multiply them.
        if _accepted([*base, *layout], model, num_gpus, source) is None:
            continue
        for virtual in _virtual(layout, model):
            for option in MEMORY_OPTIONS:
                words = [*layout, *virtual]
                config = _accepted([*base, *words], model, num_gpus, source)
                if config is None:
                    break
                words += option.words(_local_layers(config))
                config = _accepted([*base, *words], model, num_gpus, source)
                if config is not None:
                    yield Candidate((*base, *words), config, option.name)


def _layouts(model: ModelConfig, num_gpus: int, gpus_per_node: int) -> Iterator[list[str]]:
    """Sizes whose product divides the number of GPUs, with how keys and values travel and the optimizer is held."""
    for tp in _divisors(num_gpus, gpus_per_node):
        for pp in _divisors(num_gpus // tp, model.num_layers):
            for cp in _divisors(num_gpus // tp // pp, num_gpus):
                words: list[str] = []
                if tp > 1:
                    words += ["--tensor-model-parallel-size", str(tp), "--sequence-parallel"]
                if pp > 1:
                    words += ["--pipeline-model-parallel-size", str(pp)]
                sharded = [["--use-distributed-optimizer"]] if tp * pp < num_gpus else [[]]
                exchanges = [["--context-parallel-size", str(cp), "--cp-comm-type", kind] for kind in CP_COMM_TYPES]
                for exchange in exchanges if cp > 1 else [[]]:
                    for optimizer in sharded:
                        yield [*words, *exchange, *optimizer]


def _virtual(layout: Sequence[str], model: ModelConfig) -> Iterator[list[str]]:
    """No virtual stages, then every number of layers per virtual stage."""
    yield []
    if "--pipeline-model-parallel-size" in layout:
        stages = int(layout[layout.index("--pipeline-model-parallel-size") + 1])
        local = model.num_layers // stages
        for layers in _divisors(local, local - 1):
            if local // layers <= MAX_VIRTUAL_STAGES:
                yield ["--num-layers-per-virtual-pipeline-stage", str(layers)]


def _accepted(words: Sequence[str], model: ModelConfig, num_gpus: int, source: str) -> RunConfig | None:
    try:
        config = parse_arguments(words).with_model(model, source).with_device_defaults("local", "nccl")
        validate(config, num_gpus)
    except ConfigError:
        return None
    return config


def _local_layers(config: RunConfig) -> int:
    return config.model.num_layers // config.parallel.pipeline_model_parallel_size // num_virtual(config)


def _divisors(number: int, at_most: int) -> Iterator[int]:
    return (divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)
