"""Documents of real text, and the same in the layout of the authors' tokenized sets."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_longpo.data.document import CHOSEN, REJECTED, TokenizedDocument
from megatron_longpo.pairs import PreferenceDocument, Turn

NO = -100


def text_document(text: str, number: int, num_turns: int) -> PreferenceDocument:
    """Real text with one to four turns; instructions have two paragraphs in every second turn."""
    content = text[number * 9_000 :][: 1_500 + 700 * number].strip()
    turns = []
    for turn in range(num_turns):
        span = (500 - 50 * turn, 900 - 50 * turn)
        instruction = f"What is part {turn}?" if turn % 2 else f"Look at part {turn}.\n\nWhat does it say?"
        turns.append(Turn(instruction, f"It is {turn} ✓, of {number}.", f"Not\n{turn}.", content[slice(*span)], span))
    return PreferenceDocument(f"document {number}", content, tuple(turns))


def token_row(tokenized: TokenizedDocument) -> dict[str, Any]:
    """A tokenized document in the authors' layout; short prompts are padded to one length."""

    def sequence(prefix: np.ndarray, branch: Any) -> tuple[list[int], list[int]]:
        ids = [*prefix.tolist(), *branch.tokens.tolist()]
        labels = [NO] * len(ids)
        for _, start, end in branch.spans:
            labels[len(prefix) + start : len(prefix) + end] = ids[len(prefix) + start : len(prefix) + end]
        return ids, labels

    assert tokenized.joint is not None
    row: dict[str, Any] = {"id": tokenized.id}
    for role, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        ids, labels = sequence(tokenized.document_tokens, tokenized.joint[role])
        row |= {f"{name}_input_ids": ids, f"{name}_labels": labels}
        shorts = [sequence(s.prefix_tokens, (s.chosen, s.rejected)[role]) for s in tokenized.short]
        if shorts:
            longest = max(len(ids) for ids, _ in shorts)
            row[f"ref_{name}_input_ids"] = [ids + [0] * (longest - len(ids)) for ids, _ in shorts]
            row[f"ref_{name}_labels"] = [labels + [NO] * (longest - len(ids)) for ids, labels in shorts]
            row[f"ref_{name}_attention_mask"] = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in shorts]
    return row
