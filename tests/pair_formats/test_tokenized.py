"""The authors' tokenized rows: labels mark the responses, masks the padding, and every inconsistency is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_longpo.pair_formats import tokenized
from megatron_longpo.pair_formats.document import Location, PairsError

HERE = Location("rows.parquet", 2)
NO = -100


def row(**changes: Any) -> dict[str, Any]:
    """Two turns; the short prompts are padded to one length, as the authors' are."""
    return {
        "chosen_input_ids": [1, 10, 11, 20, 21, 2, 12, 22, 2],
        "chosen_attention_mask": [1] * 9,
        "chosen_labels": [NO, NO, NO, 20, 21, 2, NO, 22, 2],
        "rejected_input_ids": [1, 10, 11, 30, 2, 12, 31, 32, 2],
        "rejected_attention_mask": [1] * 9,
        "rejected_labels": [NO, NO, NO, 30, 2, NO, 31, 32, 2],
        "ref_chosen_input_ids": [[1, 11, 20, 21, 2], [1, 12, 22, 2, 0]],
        "ref_chosen_attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "ref_chosen_labels": [[NO, NO, 20, 21, 2], [NO, NO, 22, 2, NO]],
        "ref_rejected_input_ids": [[1, 11, 30, 2, 0], [1, 12, 31, 32, 2]],
        "ref_rejected_attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        "ref_rejected_labels": [[NO, NO, 30, 2, NO], [NO, NO, 31, 32, 2]],
    } | changes


def test_a_row_of_two_turns() -> None:
    pair = tokenized.parse(row(), HERE)
    assert pair.id == "rows.parquet:2"
    assert pair.chosen.tokens.dtype == np.int32
    assert pair.chosen.responses() == [(3, 6), (7, 9)] and pair.rejected.responses() == [(3, 5), (6, 9)]
    assert [sequence.tokens.tolist() for sequence in pair.short_chosen] == [[1, 11, 20, 21, 2], [1, 12, 22, 2]]
    assert [sequence.responses() for sequence in pair.short_rejected] == [[(2, 4)], [(2, 5)]]


def test_nested_long_sequences_and_arrays_are_read_too() -> None:
    reference = tokenized.parse(row(), HERE)
    long = [f"{role}_{kind}" for role in ("chosen", "rejected") for kind in ("input_ids", "labels", "attention_mask")]
    nested = row(**{key: [row()[key]] for key in long})
    arrays = {
        key: [np.array(v) for v in value] if isinstance(value[0], list) else np.array(value)
        for key, value in row().items()
    }
    for other in (nested, arrays):
        pair = tokenized.parse(other, HERE)
        assert np.array_equal(pair.chosen.tokens, reference.chosen.tokens)
        assert pair.rejected.responses() == reference.rejected.responses()
        assert len(pair.short_chosen) == 2


def test_masks_and_short_prompts_are_optional() -> None:
    bare = {key: value for key, value in row().items() if "mask" not in key}
    assert [s.tolist() for s in (x.tokens for x in tokenized.parse(bare, HERE).short_chosen)][1] == [1, 12, 22, 2]
    only_long = {key: value for key, value in row().items() if not key.startswith("ref_")}
    assert tokenized.parse(only_long, HERE).short_chosen == ()


def test_padding_at_either_end_of_the_long_sequence_goes() -> None:
    padded = row(
        chosen_input_ids=[0, *row()["chosen_input_ids"], 0],
        chosen_attention_mask=[0, *[1] * 9, 0],
        chosen_labels=[NO, *row()["chosen_labels"], NO],
    )
    assert tokenized.parse(padded, HERE).chosen.tokens.tolist() == row()["chosen_input_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_labels": None}, "field 'chosen_labels' is missing"),
        ({"rejected_input_ids": None}, "field 'rejected_input_ids' is missing"),
        ({"chosen_labels": [NO, 20]}, "'chosen_labels' has 2 entries for 9 tokens"),
        ({"chosen_labels": [NO] * 9}, "'chosen_labels' marks no response"),
        ({"chosen_labels": [1, NO, NO, 20, 21, 2, NO, 22, 2]}, "'chosen_labels' marks the first token"),
        ({"chosen_labels": [NO, NO, 20, 21, 2, NO, 22, 2, NO]}, "says 20 at token 2, which is 11.*not shifted"),
        ({"chosen_labels": [NO, NO, NO, 20, 21, 2, NO, NO, NO]}, "'rejected_labels' mark 2 .*'chosen_labels' mark 1"),
        ({"chosen_input_ids": [1, 10, 11, 20, 21, 2, 12, 22, -2]}, "'chosen_input_ids' has -2 at token 8"),
        ({"chosen_input_ids": [1, 10, 11, 20, 21, 2, 12, 22, 2**31]}, "has 2147483648 at token 8"),
        ({"chosen_input_ids": "text"}, "'chosen_input_ids' is not a list of whole numbers"),
        ({"chosen_input_ids": [1.5, 2]}, "not a list of whole numbers"),
        ({"chosen_input_ids": [[1], [2, 3]]}, "not a list of whole numbers"),
        ({"chosen_attention_mask": [1, 0, 1, 1, 1, 1, 1, 1, 1]}, "'chosen_attention_mask' does not show one unbroken"),
        ({"chosen_attention_mask": [0] * 9}, "'chosen_attention_mask' does not show"),
        (
            {"rejected_input_ids": row()["chosen_input_ids"], "rejected_labels": row()["chosen_labels"]},
            "'rejected_input_ids' is identical",
        ),
        ({"ref_chosen_input_ids": [[1, 11, 20, 21, 2]]}, "'ref_chosen_input_ids' has 1 sequences .* mark 2 responses"),
        ({"ref_chosen_labels": None}, "'ref_chosen_labels' has no sequences"),
        ({"ref_rejected_input_ids": None}, "'ref_rejected_input_ids' is missing or 'ref_chosen_input_ids' is"),
        (
            {"ref_chosen_labels": [[NO, NO, 20, NO, 2], [NO, NO, 22, 2, NO]]},
            r"'ref_chosen_labels\[0\]' marks 2 responses",
        ),
        ({"ref_chosen_input_ids": [[], [1, 12, 22, 2, 0]]}, r"'ref_chosen_input_ids\[0\]' is not a list"),
    ],
)
def test_inconsistencies_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PairsError, match=rf"^rows\.parquet:2: .*{message}"):
        tokenized.parse(row(**changes), HERE)
