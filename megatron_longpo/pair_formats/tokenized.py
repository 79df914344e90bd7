"""The LongPO authors' released sets: rows of token ids with labels, made with their own template.

``chosen_input_ids`` and ``rejected_input_ids`` hold the joint long conversation (in some releases inside one more
list), ``ref_chosen_input_ids`` and ``ref_rejected_input_ids`` one padded sequence per turn. Each has ``…_labels`` of
the same shape, -100 except on response tokens (not shifted), and may have ``…_attention_mask``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.pair_formats.document import Location, PairsError, TokenizedPair, TokenSequence
from megatron_longpo.pair_formats.trl import row_id

IGNORED_LABEL = -100
_LARGEST_ID = np.iinfo(np.int32).max


def parse(row: Mapping[str, Any], where: Location) -> TokenizedPair:
    """A tokenized row as a pair.

    Raises:
        PairsError: Labels, masks, turns or short prompts do not fit the tokens.
    """
    chosen, rejected = (_long(row, f"{role}_", where) for role in ("chosen", "rejected"))
    num_turns = len(chosen.responses())
    if len(rejected.responses()) != num_turns:
        problem = f"mark {len(rejected.responses())} responses and 'chosen_labels' mark {num_turns}"
        raise PairsError(where, "rejected_labels", problem, "both must answer the same turns")
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise PairsError(where, "rejected_input_ids", "is identical to 'chosen_input_ids'", "leave this pair out")
    short_chosen, short_rejected = (_short(row, f"ref_{role}_", num_turns, where) for role in ("chosen", "rejected"))
    if len(short_chosen) != len(short_rejected):
        raise PairsError(
            where, "ref_rejected_input_ids", "is missing or 'ref_chosen_input_ids' is", "give both or none"
        )
    return TokenizedPair(row_id(row, where), chosen, rejected, short_chosen, short_rejected, where)


def _long(row: Mapping[str, Any], prefix: str, where: Location) -> TokenSequence:
    def flat(key: str) -> Any:
        value = row.get(key)
        nested = isinstance(value, list) and len(value) == 1 and isinstance(value[0], list | np.ndarray)
        return value[0] if nested and isinstance(value, list) else value

    ids, labels, mask = (flat(f"{prefix}{kind}") for kind in ("input_ids", "labels", "attention_mask"))
    return _sequence(ids, labels, mask, prefix, "", where)


def _short(row: Mapping[str, Any], prefix: str, num_turns: int, where: Location) -> tuple[TokenSequence, ...]:
    if row.get(f"{prefix}input_ids") is None:
        return ()
    columns = []
    for kind in ("input_ids", "labels", "attention_mask"):
        value = row.get(f"{prefix}{kind}")
        if value is None and kind == "attention_mask":
            value = [None] * num_turns
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != num_turns:
            count = len(value) if isinstance(value, Sequence) else "no"
            problem = f"has {count} sequences and 'chosen_labels' mark {num_turns} responses"
            raise PairsError(where, f"{prefix}{kind}", problem, "give one sequence per turn")
        columns.append(value)
    sequences = []
    for turn, (ids, labels, mask) in enumerate(zip(*columns, strict=True)):
        sequence = _sequence(ids, labels, mask, prefix, f"[{turn}]", where)
        if len(sequence.responses()) != 1:
            problem = f"marks {len(sequence.responses())} responses"
            raise PairsError(where, f"{prefix}labels[{turn}]", problem, "a short prompt must have exactly one")
        # What follows the response is padding or the start of a next message; nothing is predicted there.
        end = sequence.responses()[0][1]
        sequences.append(TokenSequence(sequence.tokens[:end], sequence.is_response[:end]))
    return tuple(sequences)


def _sequence(ids: Any, labels: Any, mask: Any, prefix: str, at: str, where: Location) -> TokenSequence:
    tokens = _integers(ids, f"{prefix}input_ids{at}", where)
    marks = _integers(labels, f"{prefix}labels{at}", where)
    if len(marks) != len(tokens):
        problem = f"has {len(marks)} entries for {len(tokens)} tokens"
        raise PairsError(where, f"{prefix}labels{at}", problem, "give one label per token")
    if mask is not None:
        kept = _integers(mask, f"{prefix}attention_mask{at}", where)
        shown = np.flatnonzero(kept)
        if len(kept) != len(tokens) or len(shown) == 0 or shown[-1] - shown[0] + 1 != len(shown):
            problem = f"does not show one unbroken piece of the {len(tokens)} tokens"
            raise PairsError(where, f"{prefix}attention_mask{at}", problem, "only padding at the ends may be masked")
        tokens, marks = (array[shown[0] : shown[-1] + 1] for array in (tokens, marks))
    bad = np.flatnonzero((tokens < 0) | (tokens > _LARGEST_ID))
    if len(bad):
        problem = f"has {tokens[bad[0]]} at token {bad[0]}"
        raise PairsError(where, f"{prefix}input_ids{at}", problem, "token ids are not negative")
    is_response = marks != IGNORED_LABEL
    wrong = np.flatnonzero(is_response & (marks != tokens))
    if len(wrong):
        problem = f"says {marks[wrong[0]]} at token {wrong[0]}, which is {tokens[wrong[0]]}"
        raise PairsError(
            where, f"{prefix}labels{at}", problem, f"a label is its own token or {IGNORED_LABEL}, not shifted"
        )
    if not is_response.any():
        raise PairsError(where, f"{prefix}labels{at}", "marks no response", "leave this pair out")
    if is_response[0]:
        raise PairsError(where, f"{prefix}labels{at}", "marks the first token", "a response needs a prompt before it")
    return TokenSequence(tokens.astype(np.int32), is_response)


def _integers(value: Any, name: str, where: Location) -> NDArray[np.int64]:
    if value is None:
        raise PairsError(where, name, "is missing", "add it")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        array = np.zeros(0)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
        raise PairsError(where, name, "is not a list of whole numbers", "give a flat list of token ids")
    return array.astype(np.int64)
