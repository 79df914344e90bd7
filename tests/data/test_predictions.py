"""Predictions against the definition: every needed next token of every conversation, once, on one rank."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_longpo.data.batch import Batch, collate
from megatron_longpo.data.predictions import ReferenceTurns
from megatron_longpo.data.rows import OBJECTIVE_ROLES, TrainingRow, training_row
from tests.data.samples import random_document, training_rows


@dataclass(frozen=True)
class Settings:
    objective: str
    nll_weight: float = 1.0


class RandomReference:
    """Reference log-probs of the right lengths, or of lengths that are ``longer`` by a few tokens."""

    def __init__(self, rows: list[TrainingRow], longer: int = 0) -> None:
        rng = np.random.default_rng(0)
        self.turns: dict[int, list[list[NDArray[np.float32]]]] = {}
        for number, row in enumerate(rows):
            self.turns[number] = [[np.zeros(0, np.float32), np.zeros(0, np.float32)] for _ in range(row.num_turns)]
            for branch in row.branches:
                for turn, start, end in branch.spans:
                    length = max(1, end - start + longer)
                    self.turns[number][turn][branch.role] = rng.standard_normal(length).astype(np.float32)

    def of(self, number: int) -> ReferenceTurns:
        return [(chosen, rejected) for chosen, rejected in self.turns[number]]


def numbered(rows: list[TrainingRow]) -> list[TrainingRow]:
    return [TrainingRow(f"row-{n}", n, row.prefix, row.branches, row.num_turns) for n, row in enumerate(rows)]


def shards(rows: list[TrainingRow], settings: Settings | None, cp_size: int, **extra: object) -> list[Batch]:
    return [
        collate(rows, objective=settings, cp_size=cp_size, cp_rank=rank, row_multiple=cp_size, **extra)  # type: ignore[arg-type]
        for rank in range(cp_size)
    ]


def places(rows: list[TrainingRow], batches: list[Batch]) -> list[tuple[tuple[int, int, int], dict[str, float]]]:
    """Every prediction of all ranks as ((document, segment, index of the target in the segment), its fields).

    The segment is -1 for the prefix; for a branch's first token the target is index 0.
    """
    found = []
    for rank, batch in enumerate(batches):
        row_index = batch.layout.local_index(rank)[batch.predictions.source_index]
        for k, source in enumerate(row_index.tolist()):
            document = int(batch.predictions.document_index[k])
            target = int(batch.predictions.targets[k])
            slot = int(batch.predictions.response_slot[k])
            prefix, *branches = batch.layout.of_document(document)
            if prefix.start <= source < prefix.stop - 1:
                key = (document, -1, source - prefix.start + 1)
            elif source == prefix.stop - 1:
                # The same source serves every branch; the slot or the target tells which, tested below.
                key = (document, -2, 0)
            else:
                number = next(i for i, b in enumerate(branches) if b.start <= source < b.stop)
                key = (document, number, source - branches[number].start + 1)
            found.append((key, {"target": target, "slot": slot, "weight": float(batch.predictions.nll_weight[k])}))
    return found


def needed(rows: list[TrainingRow], settings: Settings | None) -> list[tuple[tuple[int, int, int], int, int]]:
    """By the definition: (key as in `places`, target, slot) of every prediction that the objective reads."""
    max_turns = max(row.num_turns for row in rows)
    nll_role = None
    if settings is not None:
        whole = settings.objective == "sft-chosen" or settings.nll_weight != 0
        nll_role = 1 if settings.objective == "sft-rejected" else (0 if whole else None)
    result = []
    for document, row in enumerate(rows):
        if any(branch.role == nll_role for branch in row.branches):
            result += [((document, -1, i), int(row.prefix[i]), -1) for i in range(1, len(row.prefix))]
        for number, branch in enumerate(row.branches):
            for i, token in enumerate(branch.tokens.tolist()):
                turns = [turn for turn, start, end in branch.spans if start <= i < end]
                slot = (document * max_turns + turns[0]) * 2 + branch.role if turns else -1
                if turns or branch.role == nll_role:
                    key = (document, number, i) if i else (document, -2, 0)
                    result.append((key, token, slot))
    return result


objectives = st.sampled_from([None, *(Settings(name, weight) for name in OBJECTIVE_ROLES for weight in (1.0, 0.0))])


@given(st.lists(training_rows(), min_size=1, max_size=3), objectives, st.sampled_from([1, 2, 3]))
def test_exactly_the_needed_tokens_are_predicted_once(
    rows: list[TrainingRow], settings: Settings | None, cp_size: int
) -> None:
    rows = numbered(rows)
    batches = shards(rows, settings, cp_size, reference=RandomReference(rows))
    found = [(key, int(values["target"]), int(values["slot"])) for key, values in places(rows, batches)]
    assert sorted(found) == sorted(needed(rows, settings))


@given(st.lists(training_rows(), min_size=1, max_size=3), objectives, st.sampled_from([1, 2]))
def test_the_source_is_the_token_before_the_target(
    rows: list[TrainingRow], settings: Settings | None, cp_size: int
) -> None:
    rows = numbered(rows)
    for batch in shards(rows, settings, cp_size, reference=RandomReference(rows)):
        predictions = batch.predictions
        written_out = {
            (tuple(row.prefix.tolist() + branch.tokens.tolist()), document)
            for document, row in enumerate(rows)
            for branch in row.branches
        }
        for k in range(len(predictions.targets)):
            source = predictions.source_index[k]
            position = int(batch.position_ids[source])
            pair = (int(batch.tokens[source]), int(predictions.targets[k]))
            document = int(predictions.document_index[k])
            assert any(s[position : position + 2] == pair for s, owner in written_out if owner == document)
        assert torch.equal(predictions.source_index, predictions.source_index.sort().values)


@given(st.lists(training_rows(), min_size=1, max_size=3), st.sampled_from([1, 2, 3]))
def test_nll_weights_make_the_mean_of_every_sequences_own_mean(rows: list[TrainingRow], cp_size: int) -> None:
    rows = [row for row in numbered(rows) if any(branch.role == 0 for branch in row.branches)]
    if not rows:
        return
    rows = numbered(rows)
    rng = np.random.default_rng(1)
    # A log-prob for every place that can be predicted; the first tokens of branches are told apart by their targets.
    logps: dict[tuple[int, int, int], float] = defaultdict(lambda: float(rng.standard_normal()))
    expected = []
    for document, row in enumerate(rows):
        means = []
        for number, branch in enumerate(row.branches):
            if branch.role == 0:
                prefix = [logps[document, -1, i] for i in range(1, len(row.prefix))]
                first = [logps[document, -2, int(branch.tokens[0])]]
                means.append(
                    np.mean(prefix + first + [logps[document, number, i] for i in range(1, len(branch.tokens))])
                )
        expected.append(np.mean(means))
    totals = np.zeros(len(rows))
    for (document, segment, index), values in places(rows, shards(rows, Settings("sft-chosen"), cp_size)):
        key = (document, segment, int(values["target"])) if segment == -2 else (document, segment, index)
        totals[document] += values["weight"] * logps[key]
    np.testing.assert_allclose(totals, expected, rtol=1e-5, atol=1e-6)


@given(st.lists(training_rows(), min_size=1, max_size=2), st.sampled_from([1, 2]))
def test_slots_and_offsets_rebuild_every_response(rows: list[TrainingRow], cp_size: int) -> None:
    rows = numbered(rows)
    batches = shards(rows, None, cp_size)
    tokens: dict[tuple[int, int], int] = {}
    for batch in batches:
        for k in range(len(batch.predictions.targets)):
            key = (int(batch.predictions.response_slot[k]), int(batch.response_offset[k]))
            assert key not in tokens
            tokens[key] = int(batch.predictions.targets[k])
    max_turns = batches[0].predictions.max_turns
    for document, row in enumerate(rows):
        for branch in row.branches:
            for turn, start, end in branch.spans:
                slot = (document * max_turns + turn) * 2 + branch.role
                response = [tokens.pop((slot, offset)) for offset in range(end - start)]
                assert response == branch.tokens[start:end].tolist()
    assert not tokens


@pytest.mark.parametrize("longer", [0, 3, -2])
@pytest.mark.parametrize("turns", ["joint", "independent"])
def test_reference_logps_keep_their_sum_per_response(turns: str, longer: int) -> None:
    rows = [training_row(random_document(seed, 3), turns, number=seed) for seed in range(2)]
    reference = RandomReference(rows, longer)
    batches = shards(rows, Settings("longpo"), 2, reference=reference)
    max_turns = batches[0].predictions.max_turns
    sums = np.zeros(2 * max_turns * 2)
    for batch in batches:
        slots, logps = batch.predictions.response_slot, batch.predictions.reference_logps
        assert not logps[slots < 0].any()
        np.add.at(sums, slots[slots >= 0].numpy(), logps[slots >= 0].numpy())
    expected = [logps.sum() for row in rows for turn in reference.of(row.number) for logps in turn]
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)


def test_reference_logps_lie_on_their_own_tokens() -> None:
    row = training_row(random_document(5, 1), "joint")
    reference = RandomReference([row])
    batch = collate([row], objective=Settings("sft-chosen-constraint"), reference=reference)
    chosen = batch.predictions.response_slot == 0
    assert batch.predictions.reference_logps[chosen].tolist() == reference.of(0)[0][0].tolist()


def test_the_constraint_objective_refuses_a_response_of_other_tokens() -> None:
    row = training_row(random_document(5, 1), "joint")
    with pytest.raises(ValueError, match="token by token"):
        collate([row], objective=Settings("sft-chosen-constraint"), reference=RandomReference([row], 1))


def test_a_reference_of_another_dataset_is_refused() -> None:
    row = training_row(random_document(5, 2), "joint")
    other = training_row(random_document(5, 3), "joint")
    with pytest.raises(ValueError, match=r"2 turns.*have 3.*compute_reference_logprobs"):
        collate([row], objective=Settings("longpo"), reference=RandomReference([other]))


def test_a_missing_reference_is_an_error_only_where_it_is_used() -> None:
    row = training_row(random_document(5, 2), "joint", (0,))
    with pytest.raises(ValueError, match="compute_reference_logprobs"):
        collate([row], objective=Settings("longpo"))
    assert collate([row], objective=Settings("sft-chosen")).predictions.reference_logps.eq(0).all()


def test_turn_mask_and_dtypes() -> None:
    rows = [training_row(random_document(seed, turns), "joint", number=seed) for seed, turns in ((0, 1), (1, 3))]
    predictions = collate(rows, objective=None).predictions
    assert predictions.turn_mask.tolist() == [[True, False, False], [True, True, True]]
    assert predictions.num_documents == 2 and predictions.max_turns == 3
    integers = ("source_index", "targets", "document_index", "response_slot")
    assert all(getattr(predictions, name).dtype == torch.int64 for name in integers)
    assert predictions.nll_weight.dtype == predictions.reference_logps.dtype == torch.float32
