"""Ways to trade time for memory that the search tries on every layout, and the flags that ask for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_longpo.config import RunConfig
from megatron_longpo.config.flags import FLAGS

PIECE_TOKENS, MOST_PIECES = 4096, 32
"""Of a row in pieces: still large matrix products, and activations that are small beside a long row's."""

HALF, ALL, PIECE = "half of the layers", "all layers", "a piece"
"""Stand for a number of layers of a (virtual) pipeline stage, and of tokens."""

Changes = Mapping[str, Any]
"""Fields of the training or optimizer configuration, and their values."""

_ALL_LAYERS = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

RECOMPUTED: dict[str, Changes] = {
    "nothing": {},
    "MLP": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "half the layers": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": HALF,
    },
    "all but attention": _ALL_LAYERS | {"recompute_keep_attention": True},
    "everything": _ALL_LAYERS,
}
"""What is recomputed, by its name in the tables; what costs less comes first, here and below."""

PIECES: dict[str, Changes] = {
    "": {},
    # What a projection gathers is as large as what an MLP gathers: one without the other leaves the peak where it is.
    "in pieces": {"mlp_chunk_tokens": PIECE, "projection_chunk_tokens": PIECE},
}

OFFLOADED: dict[str, Changes] = {
    "": {},
    "½ activations": {"cpu_offloading_num_layers": HALF},
    "activations": {"cpu_offloading_num_layers": ALL},
}

HOSTED: dict[str, Changes] = {"": {}, "optimizer": {"optimizer_cpu_offload": True}}


@dataclass(frozen=True, eq=False)
class MemoryOption:
    """One way.

    Args:
        recomputed: What is computed again, for tables.
        on_host: What waits in host memory, for tables.
        training, optimizer: What it changes in the configuration.
    """

    recomputed: str
    on_host: str
    training: Changes
    optimizer: Changes

    def of(self, config: RunConfig) -> RunConfig | None:
        """A run with this option; None where it cannot be or has no effect."""
        layers = config.layers_per_chunk
        if self.optimizer and not config.parallel.use_distributed_optimizer:
            return None
        tokens = config.data.seq_length // config.parallel.context_parallel_size
        piece = max(PIECE_TOKENS, tokens // MOST_PIECES)
        asked = self.training.values()
        if (PIECE in asked and piece >= tokens) or (HALF in asked and layers == 1):
            return None
        numbers = {HALF: layers // 2, ALL: layers, PIECE: piece}
        changes: dict[str, Any] = {
            field: numbers.get(value, value) if isinstance(value, str) else value
            for field, value in self.training.items()
        }
        return dataclasses.replace(
            config,
            training=dataclasses.replace(config.training, **changes),
            optimizer=dataclasses.replace(config.optimizer, **self.optimizer),
        )

    def words(self, config: RunConfig) -> list[str]:
        """The flags of a run that `of` made."""
        words: list[str] = []
        for group, changes in (("training", self.training), ("optimizer", self.optimizer)):
            for field in changes:
                value = getattr(getattr(config, group), field)
                values = [] if value is True else value if isinstance(value, tuple) else [value]
                words += [_FLAG_OF[group, field], *map(str, values)]
        return words


_FLAG_OF = {(spec.group, spec.field): spec.flag for spec in FLAGS.values()}


def _options() -> Iterator[MemoryOption]:
    for hosted, optimizer in HOSTED.items():
        for offloaded, offload in OFFLOADED.items():
            for pieces, piece in PIECES.items():
                for name, recompute in RECOMPUTED.items():
                    # Pieces recompute the MLP already.
                    if piece and name == "MLP":
                        continue
                    recomputed = pieces if name == "nothing" and pieces else f"{name}, {pieces}".rstrip(", ")
                    on_host = f"{offloaded}, {hosted}".strip(", ") or "–"
                    yield MemoryOption(recomputed, on_host, {**recompute, **piece, **offload}, optimizer)


MEMORY_OPTIONS = tuple(_options())
"""All combinations. Of two that take the same time the first one in this order is tried first."""
