"""Tokenized documents and rows of random tokens for the data tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from megatron_longpo.data.document import Branch, BranchPair, ShortPrompt, TokenizedDocument, Tokens
from megatron_longpo.data.rows import RowBranch, TrainingRow

VOCAB = 50


def random_tokens(rng: np.random.Generator, length: int) -> Tokens:
    return rng.integers(0, VOCAB, length, dtype=np.int32)


def random_document(seed: int, num_turns: int = 2, *, id: str | None = None, prefix: int = 20) -> TokenizedDocument:
    """A document with every kind of conversation; answers of a turn have the same tokens in all of them."""
    rng = np.random.default_rng(seed)
    instructions = [random_tokens(rng, int(rng.integers(1, 5))) for _ in range(num_turns)]
    answers = [[random_tokens(rng, int(rng.integers(1, 7))) for _ in range(2)] for _ in range(num_turns)]

    def branch(turns: list[int], role: int, with_instruction: bool = True) -> Branch:
        pieces: list[Tokens] = []
        spans = []
        for turn in turns:
            if with_instruction:
                pieces.append(instructions[turn])
            start = sum(map(len, pieces))
            pieces.append(answers[turn][role])
            spans.append((turn, start, start + len(answers[turn][role])))
        return Branch(np.concatenate(pieces), tuple(spans))

    def pair(turns: list[int], with_instruction: bool = True) -> BranchPair:
        return branch(turns, 0, with_instruction), branch(turns, 1, with_instruction)

    independent = tuple(pair([turn]) for turn in range(num_turns))
    return TokenizedDocument(
        id=id or f"document-{seed}",
        document_tokens=random_tokens(rng, prefix),
        joint=independent[0] if num_turns == 1 else pair(list(range(num_turns))),
        independent=independent,
        short=tuple(ShortPrompt(random_tokens(rng, 9), *pair([turn], False)) for turn in range(num_turns)),
    )


@st.composite
def training_rows(draw: st.DrawFn) -> TrainingRow:
    """A row of any shape that `rows.py` can make: one branch per role, or one per turn and role."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    roles = draw(st.sampled_from([(0, 1), (0,), (1,)]))
    num_turns = draw(st.integers(1, 3))
    independent = draw(st.booleans())
    prefix = random_tokens(rng, draw(st.integers(1, 17)))
    branches = []
    for turns in [[turn] for turn in range(num_turns)] if independent else [list(range(num_turns))]:
        for role in roles:
            spans, length = [], 0
            for turn in turns:
                start = length + draw(st.integers(0, 3))
                length = start + draw(st.integers(1, 6))
                spans.append((turn, start, length))
            length += draw(st.integers(0, 2))
            branches.append(RowBranch(role, random_tokens(rng, length), tuple(spans)))
    return TrainingRow("row", draw(st.integers(0, 9)), prefix, tuple(branches), num_turns)
