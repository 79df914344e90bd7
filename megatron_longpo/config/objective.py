"""What the training minimises."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.field import Window, equals, flag

_PREFERENCE = equals("objective", "longpo", "dpo")
_REFERENCE = equals("objective", "longpo", "dpo", "sft-chosen-constraint")
_SHORT_REFERENCE = equals("objective", "longpo", "sft-chosen-constraint")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Loss and reference model."""

    objective: str = flag(
        "longpo",
        "loss to minimise",
        choices=("longpo", "dpo", "sft-chosen", "sft-rejected", "sft-chosen-constraint"),
        source="LongPO Fig. 4",
    )
    beta: float = flag(
        0.1,
        "scale of the implicit rewards, or of the constraint; the authors' script used 0.01",
        above=0,
        needs=_REFERENCE,
        source="LongPO Eq. 11",
    )
    preference_weight: float = flag(
        0.01, "weight of the preference loss", key="lambda", at_least=0, needs=_PREFERENCE, source="LongPO Eq. 14"
    )
    nll_weight: float = flag(
        1.0,
        "weight of the mean negative log-likelihood of the chosen sequence",
        at_least=0,
        needs=_REFERENCE,
        source="LongPO Eq. 14",
    )
    turns: str = flag(
        "joint",
        "turns of a document follow one another in one conversation, or each is asked on its own",
        choices=("joint", "independent"),
        source="ours",
    )
    turn_reduction: str = flag(
        "sum",
        "rewards of all turns summed inside one sigmoid, or the mean of one loss per turn",
        choices=("sum", "mean"),
        needs=_PREFERENCE,
        source="LongPO Eq. 13",
    )
    reference_rotary_base: float | None = flag(
        None,
        "RoPE base of the reference model on the short prompts; a scaling is the checkpoint's own",
        above=1,
        needs=_SHORT_REFERENCE,
        default_text="the checkpoint's own",
        source="LongPO",
    )
    reference_window_size: Window | None = flag(
        None,
        "sliding window of the reference model on the short prompts, as --window-size",
        needs=_SHORT_REFERENCE,
        unit="left,0",
        default_text="the checkpoint's own",
        source="ours",
    )
    reference_dir: str | None = flag(
        None,
        "folder of the reference log-probs",
        needs=_REFERENCE,
        unit="folder",
        default_text="beside --data-path",
        source="ours",
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probs of the reference model."""
        return self.objective in ("longpo", "dpo", "sft-chosen-constraint")

    @property
    def has_nll(self) -> bool:
        """Whether the loss has a negative log-likelihood; without it the predictions it would need are not made."""
        return self.objective in ("sft-chosen", "sft-rejected") or self.nll_weight != 0
