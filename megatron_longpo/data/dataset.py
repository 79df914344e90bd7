"""A tokenized preference dataset: its documents, the rows they make, and its split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.config.data import split_shares
from megatron_longpo.data.document import CHOSEN, REJECTED, TURNS, TokenizedDocument
from megatron_longpo.data.manifest import Manifest
from megatron_longpo.data.records import RecordReader
from megatron_longpo.data.rows import TrainingRow, short_rows, too_long, training_row


class PreferenceDataset:
    """The documents of one ``--data-path``, by number.

    Args:
        prefix: ``--data-path``: the output prefix of tools/preprocess_pairs.py.
        vocab_size: The model's true vocabulary size; None does not check.

    Raises:
        ValueError: Files are missing or damaged; a token id is beyond the vocabulary.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None) -> None:
        self.prefix = Path(prefix)
        self._reader = RecordReader(prefix)
        if vocab_size is not None and self.manifest.max_token_id >= vocab_size:
            raise ValueError(
                f"--data-path {prefix} has token id {self.manifest.max_token_id} and the model's vocabulary has "
                f"{vocab_size} entries: preprocess with this model's tokenizer (the dataset's is "
                f"{self.manifest.tokenizer.get('path')}), or use the model that belongs to the dataset"
            )

    @property
    def manifest(self) -> Manifest:
        """What the dataset says about itself."""
        return self._reader.manifest

    @property
    def hash(self) -> str:
        """The key of everything computed from this dataset's tokens."""
        return self.manifest.dataset_hash

    @property
    def vocab_size(self) -> int:
        """The tokenizer's vocabulary size; where it is not recorded, the least that has all of the tokens."""
        return int(self.manifest.tokenizer.get("vocab_size") or self.manifest.max_token_id + 1)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, number: int) -> TokenizedDocument:
        return self._reader[number]

    def row(self, number: int, turns: str, roles: Sequence[int] = (CHOSEN, REJECTED)) -> TrainingRow:
        """The training row of one document; see `rows.training_row`."""
        return training_row(self[number], turns, roles, number)

    def short_rows(self, number: int, roles: Sequence[int] = (CHOSEN, REJECTED)) -> list[TrainingRow]:
        """The rows of one document's short prompts, one per turn; see `rows.short_rows`."""
        return short_rows(self[number], roles, number)

    def row_tokens(self, turns: str) -> NDArray[np.int64]:
        """Every document's row length, both roles: int64 ``[len(self)]``, without reading any tokens.

        Raises:
            ValueError: The dataset lacks this kind of conversation in some document.
        """
        if turns not in TURNS:
            raise ValueError(f"--turns {turns} is unknown: choose one of {', '.join(TURNS)}")
        lengths = self.manifest.row_tokens[turns]
        if len(lengths) != len(self):
            other = TURNS[1 - TURNS.index(turns)]
            raise ValueError(
                f"--data-path {self.prefix} has no {turns} conversations for all of its documents: train with --turns "
                f"{other}, or run tools/preprocess_pairs.py again with --turns {turns}"
            )
        return np.array(lengths, dtype=np.int64)

    def check_lengths(self, numbers: Sequence[int], turns: str, roles: Sequence[int], limit: int) -> None:
        """Refuse documents with a conversation of more than ``limit`` tokens, without reading any tokens.

        Args:
            numbers: The documents that are used.
            turns: ``--turns``.
            roles: The roles whose conversations are used.
            limit: ``--seq-length``.

        Raises:
            ValueError: Names the first one, and the fix; the dataset lacks this kind of conversation in some document.
        """
        row_tokens = self.row_tokens(turns)
        # A row holds each of its conversations, so most documents are known to fit without a look at them.
        for number in (number for number in numbers if row_tokens[number] > limit):
            num_tokens = self._reader.conversation_tokens(number, turns, roles)
            if num_tokens > limit:
                raise too_long(self._reader.document_id(number), num_tokens, limit)

    def split(self, shares: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Divide the documents, each with all of its turns, by a hash of their ids.

        The same documents always fall on the same side, whatever their order in the pairs file.

        Args:
            shares: ``--split``, relative sizes of what is trained on and what is held out, such as ``98,2``.

        Returns:
            For each share the numbers of its documents, ascending.

        Raises:
            ValueError: The shares cannot be read, or there is one document for two shares.
        """
        num_held_out = held_out_documents(shares, len(self))
        ranks = [(hashlib.sha256(self._reader.document_id(n).encode("utf-8")).digest(), n) for n in range(len(self))]
        order = np.array([number for _, number in sorted(ranks)], dtype=np.int64)
        return np.sort(order[: len(self) - num_held_out]), np.sort(order[len(self) - num_held_out :])


def held_out_documents(shares: str, num_documents: int) -> int:
    """How many documents ``--split`` holds out: the nearest to its share; at least one, and not all, above 0."""
    train, held_out = split_shares(shares)
    if held_out == 0:
        return 0
    if num_documents < 2:
        raise ValueError(
            f"--split {shares} holds documents out and the dataset has {num_documents}: give more, or --split 100,0"
        )
    trained_on, left_out = (share / (train + held_out) * num_documents for share in (train, held_out))
    return min(max(1, int(left_out) + (left_out % 1 > trained_on % 1)), num_documents - 1)
