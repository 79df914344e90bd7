"""What becomes of one row of a pairs file: its tokens, cut if they must be, or the reason why it is left out.

Worker processes run this and import nothing else of the project: neither torch nor megatron, which take seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_longpo.data.document import CHOSEN, REJECTED, TURNS, TokenizedDocument
from megatron_longpo.data.tokenize import DEFAULT_PROMPT_TEMPLATE, DocumentTokenizer, PromptTemplate, tokenized_pair
from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.data.truncate import cut_text, cut_tokens
from megatron_longpo.pairs import Location, PairsRow, PreferenceDocument

TOO_LONG = "too_long"
IDENTICAL = "identical_tokens"
DROP_REASONS = {
    TOO_LONG: "a conversation is longer than --max-seq-length",
    IDENTICAL: "chosen and rejected are the same tokens once rendered",
}


@dataclass(frozen=True)
class PreprocessOptions:
    """The flags of tools/preprocess_pairs.py.

    Args:
        inputs: ``--input``: files or folders.
        output_prefix: ``--output-prefix``.
        tokenizer: Tokenizer and chat template.
        num_workers: ``--workers``.
        max_seq_length: ``--max-seq-length``, limit of a single conversation in tokens; None has no limit.
        truncate_document: ``--truncate-document``: cut over-long documents instead of dropping them.
        prompt_template: ``--prompt-template``.
        turns: ``--turns``.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerSpec
    num_workers: int = 1
    max_seq_length: int | None = None
    truncate_document: bool = False
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE
    turns: str = "joint"

    def __post_init__(self) -> None:
        if self.output_prefix.endswith("/"):
            raise ValueError(f"--output-prefix {self.output_prefix} is a folder: add a name, {self.output_prefix}pairs")
        if self.turns not in TURNS:
            raise ValueError(f"--turns {self.turns} is unknown: choose one of {', '.join(TURNS)}")
        if self.num_workers < 1:
            raise ValueError(f"--workers {self.num_workers} must be at least 1")
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise ValueError(f"--max-seq-length {self.max_seq_length} must be at least 2")
        if self.truncate_document and self.max_seq_length is None:
            raise ValueError("--truncate-document has no effect without --max-seq-length: give the length to cut to")
        PromptTemplate(self.prompt_template)


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Args:
        id: The row's id.
        location: Where it stands.
        document: Its tokens; None if it was dropped.
        dropped: Why it was dropped, a key of `DROP_REASONS`.
        num_tokens: Of a dropped row, the longest conversation.
        truncated: Of a cut document, what it lost: an entry of `Manifest.truncated`.
    """

    id: str
    location: Location | None
    document: TokenizedDocument | None = None
    dropped: str = ""
    num_tokens: int = 0
    truncated: dict[str, Any] | None = None


def make_worker(options: PreprocessOptions) -> Callable[[PairsRow], Outcome]:
    """What a worker process does with one row."""
    tokenizer = options.tokenizer.load()
    tokenize = DocumentTokenizer(tokenizer, PromptTemplate(options.prompt_template), options.turns)
    limit = options.max_seq_length

    def work(row: PairsRow) -> Outcome:
        """Tokenize a row; drop it where its answers agree, drop it or cut its document where it is too long."""
        document = tokenize(row) if isinstance(row, PreferenceDocument) else tokenized_pair(row)
        if _prefers_nothing(document):
            return Outcome(row.id, row.location, dropped=IDENTICAL, num_tokens=document.longest_sequence_tokens)
        num_tokens = max(document.longest_sequence_tokens, document.longest_short_tokens)
        if limit is None or num_tokens <= limit:
            return Outcome(row.id, row.location, document)
        cut = None
        if options.truncate_document and document.longest_short_tokens <= limit:
            if isinstance(row, PreferenceDocument):
                cut = cut_text(row, document, limit, tokenize, tokenizer)
            else:
                cut = cut_tokens(document, limit)
        if cut is None:
            return Outcome(row.id, row.location, dropped=TOO_LONG, num_tokens=num_tokens)
        about = {"tokens_cut": cut.tokens_cut, "turns_with_cut_chunk": list(cut.turns_with_cut_chunk)}
        return Outcome(row.id, row.location, cut.document, truncated=about)

    return work


def _prefers_nothing(document: TokenizedDocument) -> bool:
    pairs = document.independent or ((document.joint,) if document.joint else ())
    return all(
        np.array_equal(pair[CHOSEN].response(turn), pair[REJECTED].response(turn))
        for pair in pairs
        for turn, _, _ in pair[CHOSEN].spans
    )
