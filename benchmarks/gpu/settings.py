"""What the GPU benchmark runs on the real device, and in seconds on a CPU to see that it runs at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.step.case import StepCase


@dataclass(frozen=True)
class Runs:
    """Steps of one shape with one way to save memory.

    Args:
        shape: A name of `Settings.shapes`.
        saving: A name of `Settings.savings`.
        lengths: Document tokens.
    """

    shape: str
    saving: str
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """Sizes of every part.

    Args:
        shapes: Models by name; their documents are replaced.
        savings: Flags of the trainer by name: what saves memory, or the optimizer that fits.
        speed: Steps that are timed, most wanted first.
        new_lengths: Shape, way to save memory and longest document of the steps on documents of ever new lengths.
        longest: The shape and the way to save memory whose longest document is looked for, most wanted first.
        window_tokens: Sliding window of that search, so that a step takes seconds.
        first_length: Where the search begins; it goes up by an eighth of this at a time.
        length_limit: Where it ends, if everything fits.
        matmul_size: Rows and columns of square matrices.
        attention_tokens: Length of the row whose attention is timed.
        rivals: Case of the comparison with TRL and others.
        rival_lengths: Its lengths, as far as they survive.
        more_rival_lengths: Those of four turns and of longer responses.
    """

    shapes: dict[str, StepCase]
    savings: dict[str, tuple[str, ...]]
    speed: tuple[Runs, ...]
    new_lengths: tuple[tuple[str, str, int], ...]
    longest: tuple[tuple[str, str], ...]
    window_tokens: int
    first_length: int
    length_limit: int
    matmul_size: int
    attention_tokens: int
    rivals: StepCase
    rival_lengths: tuple[int, ...]
    more_rival_lengths: tuple[int, ...]


_FULL = ("--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1")
_KEPT = (*_FULL, "--recompute-keep-attention")
_QWEN_1_5B = StepCase(
    response_tokens=512,
    num_layers=28,
    hidden_size=1536,
    ffn_hidden_size=8960,
    num_attention_heads=12,
    num_query_groups=2,
    vocab_size=151936,
    device="cuda",
    bf16=True,
)
_MISTRAL_7B = replace(
    _QWEN_1_5B,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32768,
)


def _savings(num_layers: int, piece_tokens: int) -> dict[str, tuple[str, ...]]:
    pieces = (f"--mlp-chunk-tokens={piece_tokens}", f"--projection-chunk-tokens={piece_tokens}")
    offload = f"--cpu-offloading-num-layers={num_layers}"
    sgd = ("--optimizer=sgd", "--sgd-momentum=0")
    return {
        "none": (),
        "recompute": _FULL,
        "kept": _KEPT,
        # Attention kept in some layers, and everything in the others.
        "kept in 16 layers": _kept_in(16),
        "kept in 2 layers": _kept_in(2),
        "kept, pieces": (*_KEPT, *pieces),
        "kept, pieces, offload": (*_KEPT, *pieces, offload),
        "optimizer offload": (
            "--use-distributed-optimizer",
            "--optimizer-cpu-offload",
            "--overlap-cpu-optimizer-d2h-h2d",
        ),
        # Weights, gradients, fp32 weights and Adam's state of 7B are 121 GiB; without the latter half of it.
        "SGD": sgd,
        "SGD, kept": (*sgd, *_KEPT),
        "SGD, kept, pieces, offload": (*sgd, *_KEPT, *pieces, offload),
    }


def _kept_in(num_layers: int) -> tuple[str, ...]:
    return (
        "--recompute-granularity=full",
        "--recompute-method=block",
        f"--recompute-num-layers={num_layers}",
        "--recompute-keep-attention",
    )


REAL = Settings(
    shapes={"1.5B": _QWEN_1_5B, "7B": _MISTRAL_7B, "7B, 8 layers": replace(_MISTRAL_7B, num_layers=8)},
    savings=_savings(28, 16384),
    speed=(
        Runs("1.5B", "kept in 16 layers", (131072,)),
        Runs("1.5B", "none", (8192, 32768)),
        Runs("7B, 8 layers", "kept in 2 layers", (131072,)),
        Runs("7B, 8 layers", "kept", (262144,)),
        Runs("1.5B", "kept", (262144, 32768)),
        Runs("7B", "SGD, kept, pieces, offload", (131072,)),
        Runs("7B", "SGD", (8192,)),
        Runs("7B", "SGD, kept", (32768,)),
        Runs("1.5B", "kept, pieces", (32768,)),
        Runs("1.5B", "recompute", (32768,)),
        Runs("1.5B", "kept, pieces, offload", (32768,)),
        Runs("1.5B", "optimizer offload", (32768,)),
    ),
    new_lengths=(("1.5B", "none", 8192), ("1.5B", "none", 32768)),
    longest=(("1.5B", "kept, pieces"),),
    window_tokens=4096,
    first_length=524288,
    length_limit=2**20,
    matmul_size=8192,
    attention_tokens=65536,
    # As in the CPU's suite, a smaller vocabulary for fewer layers, so that the LM head has a whole model's share.
    rivals=replace(_QWEN_1_5B, response_tokens=128, num_layers=8, vocab_size=32768),
    rival_lengths=(8192, 32768, 131072),
    more_rival_lengths=(32768,),
)
_TINY = StepCase(
    response_tokens=8, num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=64
)
TINY = Settings(
    shapes={"tiny": _TINY},
    savings=_savings(2, 16),
    speed=(Runs("tiny", "kept, pieces, offload", (128, 64)), Runs("tiny", "none", (64,))),
    new_lengths=(("tiny", "none", 64),),
    longest=(("tiny", "kept"),),
    window_tokens=32,
    first_length=64,
    length_limit=80,
    matmul_size=128,
    attention_tokens=256,
    rivals=replace(_TINY, num_layers=1),
    rival_lengths=(64,),
    more_rival_lengths=(),
)
