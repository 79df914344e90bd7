"""Optimizer, learning rate and weight decay."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.field import absent, equals, flag, given

_OFFLOAD = given("optimizer_cpu_offload")
_ADAM = equals("optimizer", "adam")
_WSD = equals("lr_decay_style", "WSD")
_DECAYS = equals("lr_decay_style", "cosine", "linear", "WSD")
_RAMPS = equals("weight_decay_incr_style", "linear", "cosine")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rate schedule, weight decay."""

    optimizer: str = flag(
        "adam", "Adam with decoupled weight decay; the authors' script used RMSprop", choices=("adam", "sgd")
    )
    lr: float = flag(5e-7, "highest learning rate", above=0, source="LongPO")
    min_lr: float = flag(0.0, "learning rate at the end of the decay", at_least=0, needs=_DECAYS)
    lr_decay_style: str = flag(
        "cosine", "shape of the schedule", choices=("cosine", "linear", "constant", "WSD"), source="LongPO"
    )
    lr_decay_iters: int | None = flag(
        None,
        "steps until --min-lr",
        unit="steps",
        at_least=1,
        needs=(_DECAYS, absent("lr_decay_samples", "train_samples")),
        default_text="the whole training",
    )
    lr_decay_samples: int | None = flag(
        None,
        "documents until --min-lr",
        unit="documents",
        at_least=1,
        needs=(_DECAYS, absent("lr_decay_iters", "train_iters")),
        default_text="the whole training",
    )
    lr_warmup_fraction: float = flag(
        0.1,
        "share of the decay steps spent on warm-up",
        at_least=0,
        below=1,
        needs=absent("lr_warmup_iters", "lr_warmup_samples"),
        source="LongPO",
    )
    lr_warmup_iters: int | None = flag(
        None,
        "steps of linear warm-up",
        unit="steps",
        at_least=0,
        needs=absent("lr_warmup_samples", "train_samples"),
        default_text="by --lr-warmup-fraction",
    )
    lr_warmup_samples: int | None = flag(
        None,
        "documents of linear warm-up",
        unit="documents",
        at_least=0,
        needs=absent("lr_warmup_iters", "train_iters"),
        default_text="by --lr-warmup-fraction",
    )
    lr_warmup_init: float = flag(0.0, "learning rate that warm-up starts from", at_least=0)
    lr_wsd_decay_style: str = flag(
        "exponential",
        "shape of the last phase of WSD",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
        needs=_WSD,
    )
    lr_wsd_decay_iters: int | None = flag(
        None,
        "steps of the last phase of WSD",
        unit="steps",
        at_least=1,
        needs=(_WSD, absent("lr_wsd_decay_samples", "train_samples")),
        default_text="required with WSD",
    )
    lr_wsd_decay_samples: int | None = flag(
        None,
        "documents of the last phase of WSD",
        unit="documents",
        at_least=1,
        needs=(_WSD, absent("lr_wsd_decay_iters", "train_iters")),
        default_text="required with WSD",
    )
    weight_decay: float = flag(
        0.01, "weight decay; none on biases and norms", at_least=0, needs=equals("weight_decay_incr_style", "constant")
    )
    weight_decay_incr_style: str = flag(
        "constant", "how weight decay grows over the training", choices=("constant", "linear", "cosine")
    )
    start_weight_decay: float | None = flag(
        None, "weight decay at the first step", at_least=0, needs=_RAMPS, default_text="required when it grows"
    )
    end_weight_decay: float | None = flag(
        None, "weight decay at the last step", at_least=0, needs=_RAMPS, default_text="required when it grows"
    )
    adam_beta1: float = flag(0.9, "decay of the mean of gradients", at_least=0, below=1, needs=_ADAM)
    adam_beta2: float = flag(0.999, "decay of the mean of squared gradients", at_least=0, below=1, needs=_ADAM)
    adam_eps: float = flag(1e-8, "added to the root of the mean square", above=0, needs=_ADAM)
    sgd_momentum: float = flag(0.9, "momentum", at_least=0, below=1, needs=equals("optimizer", "sgd"))
    clip_grad: float = flag(1.0, "largest norm of the gradient over all parameters; 0 turns clipping off", at_least=0)
    optimizer_cpu_offload: bool = flag(
        False,
        "keep optimizer state in host memory and update weights there (Megatron's hybrid device optimizer)",
        needs=(given("use_distributed_optimizer"), _ADAM),
    )
    optimizer_offload_fraction: float = flag(
        1.0, "share of the weights whose state is on the host", above=0, needs=_OFFLOAD
    )
    overlap_cpu_optimizer_d2h_h2d: bool = flag(
        False, "copy gradients and weights behind the update on the host", needs=_OFFLOAD
    )
