"""Dataset, sampler and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.field import Condition, flag, given


def split_shares(split: str) -> tuple[float, float]:
    """The shares of training and held-out documents in ``98,2``; ``100,0`` holds out none.

    Raises:
        ValueError: Not two numbers of at least 0, the first above 0.
    """
    try:
        train, held_out = (float(share) for share in split.split(","))
    except ValueError:
        train = held_out = -1.0
    if not (0 < train < float("inf") and 0 <= held_out < float("inf")):
        raise ValueError(
            f"--split {split!r} must be the shares of documents to train on and to hold out, such as 98,2 or 100,0"
        )
    return train, held_out


def _holds_out(split: str) -> bool:
    try:
        return split_shares(split)[1] > 0
    except ValueError:
        return True  # reported by the validation


HELD_OUT = Condition("with a held-out share in --split", ("split",), lambda values: _holds_out(values["split"]))
"""Some documents are held out for evaluation."""


@dataclass(frozen=True)
class DataConfig:
    """Dataset, split and order of documents."""

    data_path: str = flag(
        "",
        "what tools/preprocess_pairs.py wrote: PREFIX.bin, PREFIX.idx, PREFIX.manifest.json",
        unit="prefix",
        default_text="required",
    )
    split: str = flag("98,2", "shares of documents to train on and to hold out", unit="shares")
    seq_length: int = flag(
        131072,
        "longest conversation; a longer one is an error (cut or drop it in preprocessing: --max-seq-length)",
        unit="tokens",
        at_least=2,
    )
    num_workers: int = flag(2, "processes that read data ahead", unit="processes", at_least=0)
    sampler_group_samples: int = flag(
        256,
        "documents sorted by length together, so that ranks finish together; 0 turns sorting off",
        unit="documents",
        at_least=0,
        source="ours",
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer, only to check that it is the dataset's."""

    tokenizer_type: str | None = flag(
        None,
        "kind of tokenizer",
        choices=("HuggingFaceTokenizer", "SentencePieceTokenizer"),
        needs=given("tokenizer_model"),
        default_text="by --tokenizer-model: folder or .model file",
    )
    tokenizer_model: str | None = flag(
        None,
        "folder of a Hugging Face tokenizer, or SentencePiece .model file",
        unit="path",
        default_text="that of the dataset",
    )
    chat_template: str | None = flag(
        None,
        "jinja file of the chat template",
        needs=given("tokenizer_model"),
        unit="file",
        default_text="the tokenizer's own",
        source="ours",
    )
    trust_remote_code: bool = flag(
        False, "run Python code that lies in the tokenizer's folder", needs=given("tokenizer_model")
    )
