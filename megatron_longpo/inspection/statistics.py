"""Numbers over all pairs: lengths, turns, similarity of the answers, and where chunks lie in their documents."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_longpo.inspection.lengths import Length, Ruler
from megatron_longpo.inspection.numbers import Numbers
from megatron_longpo.inspection.view import token_similarity
from megatron_longpo.inspection.words import similarity, words
from megatron_longpo.pair_formats.document import PairsRow, PreferenceDocument, TokenizedPair

NUM_PARTS = 20
"""Parts of a document for which it is counted how many chunks cover them."""

DOCUMENTS, CHUNKS, INSTRUCTIONS, CHOSEN, REJECTED = "documents", "chunks", "instructions", "chosen", "rejected"
LONG_PROMPTS, SHORT_PROMPTS = "long prompts", "short prompts"


class PairStatistics:
    """What is counted while rows stream by.

    Memory holds numbers only: about a dozen of 8 bytes for each pair.
    """

    def __init__(self, ruler: Ruler) -> None:
        self._ruler = ruler
        self.formats: Counter[str] = Counter()
        self.num_documents = 0
        self.num_pairs = 0
        self.num_chosen_longer = 0
        self.num_with_chunk = 0
        self.num_with_span = 0
        self.turns = Numbers()
        self.similarity = Numbers()
        self.lengths: dict[tuple[str, str], Numbers] = {}
        self._covered = np.zeros(NUM_PARTS)

    def add(self, name: str, row: PairsRow) -> None:
        """Count a row.

        Args:
            name: Its format.
            row: The row.
        """
        self.formats[name] += 1
        self.num_documents += 1
        if isinstance(row, PreferenceDocument):
            self._add_text(row)
        else:
            self._add_tokens(row)

    def coverage(self) -> list[float]:
        """For each part of the document the share of chunks that cover it, from 0 to 1."""
        return [float(covered) / max(1, self.num_with_span) for covered in self._covered]

    def _add_text(self, row: PreferenceDocument) -> None:
        self.turns.add(len(row.turns))
        has_instruction = bool(row.turns[0].instruction)
        self._measure(DOCUMENTS if has_instruction else LONG_PROMPTS, self._ruler(row.document, with_words=False))
        for turn in row.turns:
            self.num_pairs += 1
            chosen, rejected = self._ruler(turn.chosen), self._ruler(turn.rejected)
            self._measure(CHOSEN, chosen)
            self._measure(REJECTED, rejected)
            self.num_chosen_longer += len(turn.chosen) > len(turn.rejected)
            self.similarity.add(similarity(words(turn.chosen), words(turn.rejected)))
            if turn.instruction:
                self._measure(INSTRUCTIONS, self._ruler(turn.instruction))
            if turn.chunk is not None:
                self.num_with_chunk += 1
                name = CHUNKS if turn.instruction else SHORT_PROMPTS
                self._measure(name, self._ruler(turn.chunk, with_words=False))
            if turn.chunk_span is not None:
                self.num_with_span += 1
                start, end = (place / len(row.document) * NUM_PARTS for place in turn.chunk_span)
                parts = np.arange(NUM_PARTS)
                self._covered += np.clip(np.minimum(end, parts + 1) - np.maximum(start, parts), 0, 1)

    def _add_tokens(self, row: TokenizedPair) -> None:
        chosen, rejected = row.chosen.responses(), row.rejected.responses()
        self.turns.add(len(chosen))
        self._measure(LONG_PROMPTS, Length(tokens=chosen[0][0]))
        for number, ((start, end), (other_start, other_end)) in enumerate(zip(chosen, rejected, strict=True)):
            self.num_pairs += 1
            self._measure(CHOSEN, Length(tokens=end - start))
            self._measure(REJECTED, Length(tokens=other_end - other_start))
            self.num_chosen_longer += end - start > other_end - other_start
            self.similarity.add(token_similarity(row, number))
        for short in row.short_chosen:
            self.num_with_chunk += 1
            self._measure(SHORT_PROMPTS, Length(tokens=short.responses()[0][0]))

    def _measure(self, what: str, length: Length) -> None:
        for unit, count in length.items():
            self.lengths.setdefault((what, unit), Numbers()).add(count)

    def sorted_lengths(self) -> list[tuple[str, str, Numbers]]:
        """All lengths as (what, unit, numbers): prompts first, answers last."""
        order = (DOCUMENTS, LONG_PROMPTS, CHUNKS, SHORT_PROMPTS, INSTRUCTIONS, CHOSEN, REJECTED)
        units = ("characters", "words", "tokens")
        keys = sorted(self.lengths, key=lambda key: (order.index(key[0]), units.index(key[1])))
        return [(what, unit, self.lengths[what, unit]) for what, unit in keys]
