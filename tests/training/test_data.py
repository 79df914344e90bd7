"""Which documents a run meets."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.training.data import check_lengths
from tests.tiny import write_tiny_dataset


def test_the_documents_that_a_run_meets_must_fit(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=6)
    dataset = PreferenceDataset(data)
    lengths = {n: dataset.row(n, "joint", (0, 1)).longest_sequence_tokens for n in range(6)}
    *others, longest = sorted(lengths, key=lengths.__getitem__)
    assert lengths[longest] > lengths[others[-1]]

    def check(train: list[int], held_out: list[int], *flags: str) -> None:
        common = [f"--data-path={data}", f"--seq-length={lengths[others[-1]]}", "--global-batch-size=2"]
        check_lengths(parse_arguments([*common, "--train-iters=1", *flags]), dataset, train, held_out)

    check(others, [*others[:4], longest], "--eval-iters=2")
    check([longest], others, "--eval-iters=2", "--skip-train")
    for train, held_out in (([longest], others), (others, [*others[:3], longest])):
        with pytest.raises(ValueError, match=f"'tiny-{longest}' has a conversation of {lengths[longest]} tokens"):
            check(train, held_out, "--eval-iters=2")
