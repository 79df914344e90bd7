"""The sampler: complete, deterministic, resumable, and fair to the ranks."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.data.sampler import GlobalBatchSampler

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1_000, 100_000, 1_000)

sizes = st.integers(1, 40)
batch_sizes = st.integers(1, 9)
groups = st.integers(0, 30)


def stream(num_samples: int, *arguments: object, **keywords: object) -> list[int]:
    """The first samples of a sampler, batch after batch."""
    sampler = GlobalBatchSampler(*arguments, **keywords)  # type: ignore[arg-type]
    num_batches = -(-num_samples // sampler.global_batch_size)
    return [document for batch in islice(sampler, num_batches) for document in batch][:num_samples]


@given(sizes, batch_sizes, groups, st.integers(0, 3))
def test_every_document_once_per_epoch(num_documents: int, batch: int, group: int, seed: int) -> None:
    lengths = RNG.integers(1, 100, num_documents)
    samples = stream(3 * num_documents, lengths, batch, seed, group_samples=group)
    for epoch in range(3):
        assert sorted(samples[epoch * num_documents : (epoch + 1) * num_documents]) == list(range(num_documents))


@given(sizes, batch_sizes, groups, st.integers(0, 100))
def test_resuming_anywhere_continues_the_same_stream(num_documents: int, batch: int, group: int, skip: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 100, num_documents)
    whole = stream(skip + 3 * batch, lengths, batch, 5, group_samples=group)
    resumed = GlobalBatchSampler(lengths, batch, 5, consumed_samples=skip, group_samples=group)
    assert [document for b in islice(resumed, 3) for document in b] == whole[skip:]
    assert resumed.consumed_samples == skip + 3 * batch


def test_epochs_and_seeds_differ() -> None:
    first = stream(2_000, LENGTHS, 8, 1, group_samples=64)
    assert first[:1_000] != first[1_000:]
    assert first != stream(2_000, LENGTHS, 8, 2, group_samples=64)
    assert first == stream(2_000, LENGTHS, 8, 1, group_samples=64)


def waste(batches: list[list[int]]) -> float:
    """Share of time that ranks with one document each would wait for the longest of their batch."""
    lengths = [LENGTHS[batch] for batch in batches]
    return 1 - sum(batch.sum() for batch in lengths) / sum(len(batch) * batch.max() for batch in lengths)


def test_groups_of_like_length_waste_little_time() -> None:
    plain = list(islice(GlobalBatchSampler(LENGTHS, 8, 0), 125))
    grouped = list(islice(GlobalBatchSampler(LENGTHS, 8, 0, group_samples=256), 125))
    assert waste(plain) > 0.35
    assert waste(grouped) < 0.06


def test_grouping_keeps_the_lengths_of_steps_random() -> None:
    batches = list(islice(GlobalBatchSampler(LENGTHS, 8, 0, group_samples=256), 124))
    means = np.array([LENGTHS[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_grouping_holds_in_later_epochs_although_they_start_within_a_batch() -> None:
    lengths = LENGTHS[:995]  # 995 is no multiple of 8, so batches shift against epochs
    sampler = GlobalBatchSampler(lengths, 8, 0, consumed_samples=8 * 125, group_samples=256)
    assert waste(list(islice(sampler, 123))) < 0.06


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_share_a_batch_completely(micro_batch_size: int, dp_size: int, num_steps: int) -> None:
    sampler = GlobalBatchSampler(LENGTHS, micro_batch_size * dp_size * num_steps, 0)
    batch = next(sampler)
    shares = [sampler.microbatches(batch, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    assert all(len(share) == num_steps and all(len(m) == micro_batch_size for m in share) for share in shares)
    assert sorted(document for share in shares for m in share for document in m) == sorted(batch)


def test_ranks_get_like_lengths_at_every_micro_batch_longest_first() -> None:
    sampler = GlobalBatchSampler(LENGTHS, 64, 0)
    batch = next(sampler)
    ranked = sorted(LENGTHS[batch].tolist(), reverse=True)
    shares = [sampler.microbatches(batch, 1, rank, 4) for rank in range(4)]
    for step, microbatches in enumerate(zip(*shares, strict=True)):
        assert sorted((int(LENGTHS[m[0]]) for m in microbatches), reverse=True) == ranked[4 * step : 4 * step + 4]
    pairs = [sampler.microbatches(batch, 2, rank, 4) for rank in range(4)]
    totals = np.array([[LENGTHS[m].sum() for m in share] for share in pairs])
    dealt_in_order = np.array([[ranked[8 * s + r] + ranked[8 * s + 4 + r] for s in range(8)] for r in range(4)])
    assert np.ptp(totals, axis=0).mean() < np.ptp(dealt_in_order, axis=0).mean() / 2


def test_the_order_does_not_depend_on_the_ranks() -> None:
    batches = []
    for dp_size in (1, 2, 4):
        sampler = GlobalBatchSampler(LENGTHS, 8, 0, group_samples=64)
        drawn = list(islice(sampler, 5))
        shares = [[sampler.microbatches(b, 2, rank, dp_size) for rank in range(dp_size)] for b in drawn]
        batches.append([sorted(d for share in step for m in share for d in m) for step in shares])
    assert batches[0] == batches[1] == batches[2]


def test_documents_of_a_split_keep_their_numbers() -> None:
    numbers = np.array([3, 14, 15, 92])
    sampler = GlobalBatchSampler([10, 40, 20, 30], 4, 0, documents=numbers)
    batch = next(sampler)
    assert sorted(batch) == numbers.tolist()
    assert sampler.microbatches(batch, 1, 0, 2) == [[14], [15]]
    assert sampler.microbatches(batch, 1, 1, 2) == [[92], [3]]


def test_state_travels_and_refuses_another_order() -> None:
    sampler = GlobalBatchSampler(LENGTHS, 8, 0, group_samples=64)
    for _ in range(7):
        next(sampler)
    state = sampler.state_dict()
    resumed = GlobalBatchSampler(LENGTHS, 8, 0, group_samples=64)
    resumed.load_state_dict(state)
    assert next(resumed) == next(sampler)
    others = {
        "--global-batch-size 8": GlobalBatchSampler(LENGTHS, 4, 0, group_samples=64),
        "--seed 0": GlobalBatchSampler(LENGTHS, 8, 1, group_samples=64),
        "group size 64": GlobalBatchSampler(LENGTHS, 8, 0),
        "--split": GlobalBatchSampler(LENGTHS[:-1], 8, 0, group_samples=64),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


def test_unusable_sizes_are_named() -> None:
    sampler = GlobalBatchSampler(LENGTHS, 8, 0)
    with pytest.raises(ValueError, match=r"--global-batch-size 8 must be a multiple .* 3 \* 2 = 6; nearest: 6"):
        sampler.microbatches(next(sampler), 3, 0, 2)
    with pytest.raises(ValueError, match="--data-path"):
        GlobalBatchSampler([], 8, 0)
    with pytest.raises(ValueError, match="--global-batch-size 0"):
        GlobalBatchSampler(LENGTHS, 0, 0)
    with pytest.raises(ValueError, match="consumed samples -1"):
        GlobalBatchSampler(LENGTHS, 8, 0, consumed_samples=-1)
    with pytest.raises(ValueError, match="group size -1"):
        GlobalBatchSampler(LENGTHS, 8, 0, group_samples=-1)
    with pytest.raises(ValueError, match="2 documents have 1000 lengths"):
        GlobalBatchSampler(LENGTHS, 8, 0, documents=[1, 2])
