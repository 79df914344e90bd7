"""What the GPU benchmark runs on the real device, and in seconds on a CPU to see that it runs at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.step.case import StepCase

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 of the vendor's data sheets, SXM modules, by a part of the device's name."""


@dataclass(frozen=True)
class Model:
    """A shape to train, and the flags that let it fit.

    Args:
        case: Sizes; the document is replaced.
        flags: Of the trainer, at every length.
    """

    case: StepCase
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """Sizes of every part.

    Args:
        models: By name.
        speed: Document tokens at which speed is measured, by model.
        longest: The models whose longest document is looked for.
        first_length: Where the search for the longest document begins.
        length_limit: Where it ends, if everything fits.
        matmul_size: Rows and columns of square matrices.
        attention_tokens: Length of the row whose attention is timed.
        rivals: Case of the comparison with TRL and others.
        rival_lengths: Its lengths, as far as they survive.
        more_rival_lengths: Those of four turns and of longer responses.
    """

    models: dict[str, Model]
    speed: dict[str, tuple[int, ...]]
    longest: tuple[str, ...]
    first_length: int
    length_limit: int
    matmul_size: int
    attention_tokens: int
    rivals: StepCase
    rival_lengths: tuple[int, ...]
    more_rival_lengths: tuple[int, ...]


_KEPT = (
    "--recompute-granularity=full",
    "--recompute-method=uniform",
    "--recompute-num-layers=1",
    "--recompute-keep-attention",
)
_IN_PIECES = ("--mlp-chunk-tokens=16384", "--projection-chunk-tokens=16384")
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
# Layers as wide as Mistral 7B's, but 8 of its 32: weights, gradients, masters and Adam's state of 7B are 120 GiB.
_MISTRAL_LAYERS = replace(
    _QWEN_1_5B,
    num_layers=8,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32768,
)

REAL = Settings(
    models={
        "1.5B": Model(_QWEN_1_5B, (*_KEPT, *_IN_PIECES)),
        "7B-layers": Model(_MISTRAL_LAYERS, (*_KEPT, *_IN_PIECES)),
        # The layers' inputs and attention's outputs of 512K tokens are 84 GiB of host memory.
        "1.5B-offloaded": Model(_QWEN_1_5B, (*_KEPT, *_IN_PIECES, "--cpu-offloading-num-layers=28")),
        # Not for speed: whether the optimizer's offload works at all.
        "optimizer-on-host": Model(
            replace(_QWEN_1_5B, num_layers=2),
            (*_KEPT, "--use-distributed-optimizer", "--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d"),
        ),
    },
    speed={
        "1.5B": (8192, 32768, 131072),
        "7B-layers": (8192, 32768, 131072),
        "1.5B-offloaded": (131072,),
        "optimizer-on-host": (8192,),
    },
    longest=("1.5B-offloaded",),
    first_length=131072,
    length_limit=2**19,
    matmul_size=8192,
    attention_tokens=65536,
    rivals=replace(_QWEN_1_5B, response_tokens=128, num_layers=8),
    rival_lengths=(4096, 16384, 65536),
    more_rival_lengths=(4096,),
)
_TINY = StepCase(
    response_tokens=8, num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=64
)
TINY = Settings(
    models={
        "tiny": Model(
            _TINY, (*_KEPT, "--mlp-chunk-tokens=16", "--projection-chunk-tokens=16", "--cpu-offloading-num-layers=2")
        )
    },
    speed={"tiny": (64, 128)},
    longest=("tiny",),
    first_length=64,
    length_limit=256,
    matmul_size=128,
    attention_tokens=256,
    rivals=replace(_TINY, num_layers=1),
    rival_lengths=(64,),
    more_rival_lengths=(),
)
