"""What is computed and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.data import HELD_OUT
from megatron_longpo.config.field import AUTO, above, absent, equals, flag, given

FLASH, FLASH3, FUSED = "flash", "flash3", "fused"
"""Values of ``--attention-backend``."""
_FULL = equals("recompute_granularity", "full")


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, duration, precision, recomputation, evaluation."""

    micro_batch_size: int = flag(1, "documents in one row of one rank", unit="documents", at_least=1)
    global_batch_size: int = flag(8, "documents in one optimizer step", unit="documents", at_least=1, source="LongPO")
    train_iters: int | None = flag(
        None,
        "optimizer steps",
        unit="steps",
        at_least=1,
        needs=absent("train_samples"),
        default_text="by --train-epochs",
    )
    train_samples: int | None = flag(
        None,
        "documents to train on",
        unit="documents",
        at_least=1,
        needs=absent("train_iters"),
        default_text="by --train-epochs",
    )
    train_epochs: int = flag(
        1,
        "passes over the training split",
        unit="epochs",
        at_least=1,
        needs=absent("train_iters", "train_samples"),
        source="ours",
    )
    seed: int = flag(1234, "decides initial weights and the order of documents, on any number of ranks", at_least=0)
    bf16: bool = flag(False, "bf16 weights and activations, fp32 master weights and gradients; else all fp32")
    use_cpu: bool = flag(False, "compute on the CPU even where CUDA is available", source="ours")
    transformer_impl: str = flag(
        AUTO,
        "layers of Megatron-Core or of Transformer Engine",
        choices=(AUTO, "local", "transformer_engine"),
        default_text="auto (transformer_engine on a GPU that has it, else local)",
    )
    attention_backend: str = flag(
        AUTO,
        "attention kernel on a GPU: FlashAttention 2, which comes with torch; FlashAttention 3 (flash3; Hopper, needs "
        "the package flash_attn_3); or fused, cuDNN's, for Hopper and Blackwell",
        choices=(AUTO, FLASH, FLASH3, FUSED),
        needs=given("bf16"),
        default_text="auto (fused on Hopper, else flash)",
    )
    fp8_format: str | None = flag(
        None,
        "fp8 matrix products in training steps: e4m3, or hybrid = e5m2 for gradients; evaluation is in bf16",
        choices=("e4m3", "hybrid"),
        needs=equals("transformer_impl", "transformer_engine"),
        default_text="no fp8",
    )
    fp8_recipe: str = flag(
        "delayed",
        "where fp8's scaling factors come from: largest values of earlier rows, or of the tensor itself (tensorwise)",
        choices=("delayed", "tensorwise"),
        needs=given("fp8_format"),
    )
    recompute_granularity: str | None = flag(
        None,
        "recompute activations in the backward pass: whole layers, or --recompute-modules",
        choices=("full", "selective"),
        default_text="keep all",
    )
    recompute_method: str | None = flag(
        None,
        "every group of layers, or the first layers of each stage",
        choices=("uniform", "block"),
        needs=_FULL,
        default_text="required with full",
    )
    recompute_num_layers: int | None = flag(
        None,
        "layers in a group (uniform), or layers recomputed per stage (block)",
        unit="layers",
        at_least=1,
        needs=_FULL,
        default_text="required with full",
    )
    recompute_keep_attention: bool = flag(
        False,
        "keep attention's output and log-sum-exps and recompute the rest: its kernels, most of a long step, run once",
        needs=_FULL,
        source="ours",
    )
    cpu_offloading_num_layers: int = flag(
        0,
        "first layers of each stage whose saved activations wait in host memory for the backward pass, recomputed "
        "layers or not",
        unit="layers",
        at_least=0,
    )
    mlp_chunk_tokens: int | None = flag(
        None,
        "tokens whose inner activations of an MLP exist at one time; norm and MLP are recomputed in the backward pass",
        unit="tokens",
        at_least=1,
        default_text="the whole row",
        source="ours",
    )
    projection_chunk_tokens: int | None = flag(
        None,
        "tokens whose hidden states go through the norm and the projections of attention at one time; nothing is "
        "recomputed",
        unit="tokens",
        at_least=1,
        default_text="the whole row",
        source="ours",
    )
    recompute_modules: tuple[str, ...] = flag(
        ("core_attn",),
        "parts of a layer to recompute; what norms make is never kept",
        choices=("core_attn", "mlp"),
        needs=equals("recompute_granularity", "selective"),
    )
    logits_chunk_tokens: int = flag(
        1024, "predictions whose logits exist at one time", unit="tokens", at_least=1, source="ours"
    )
    eval_interval: int = flag(
        1000, "steps between evaluations", unit="steps", at_least=1, needs=(above("eval_iters", 0), HELD_OUT)
    )
    eval_iters: int = flag(
        100,
        "global batches of one evaluation, at most the held-out split; 0 never evaluates",
        unit="batches",
        at_least=0,
        needs=HELD_OUT,
    )
    skip_train: bool = flag(
        False,
        "evaluate the held-out documents and exit, without a training step",
        needs=(above("eval_iters", 0), HELD_OUT, absent("dry_run")),
    )
    exit_interval: int | None = flag(
        None, "save and exit at the first step divisible by this", unit="steps", at_least=1, default_text="never"
    )
    exit_duration_in_mins: float | None = flag(
        None,
        "save and exit at the first step that ends this long after the process started",
        unit="minutes",
        above=0,
        default_text="never",
    )
    exit_signal_handler: bool = flag(
        False,
        "save and exit with code 0 on SIGTERM, after the current step; torchrun kills 30 s after it passed SIGTERM "
        "on, or after its --shutdown-timeout",
    )
    max_skipped_steps: int = flag(
        10,
        "stop after this many steps in a row whose loss or gradient was not finite",
        unit="steps",
        at_least=0,
        source="ours",
    )
