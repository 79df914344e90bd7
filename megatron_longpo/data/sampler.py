"""Which documents make up which global batch, and which data-parallel rank computes which of them.

The order is a function of the seed, the lengths, the global batch size and the group size, and of nothing else: not of
the number of ranks, so a run can resume on another machine and see the same batches.

Documents of like length share a batch, because ranks wait for the slowest of them: every epoch's permutation is cut
into groups of ``group_samples``, each group is sorted by length and cut into batches, and the batches of a group are
shuffled. A step's documents then are of one length while the lengths of successive steps stay random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class GlobalBatchSampler:
    """An endless iterator over global batches; every document comes once per epoch.

    Epochs follow one another without a gap: a batch at their border has documents of both.

    Args:
        lengths: For each document its tokens or any other measure of its cost.
        global_batch_size: Documents per batch.
        seed: Decides the order.
        consumed_samples: Documents already used; any number, not only whole batches.
        group_samples: Documents that are sorted by length together, rounded to whole batches; 0 does not sort.
        documents: The documents' numbers, where they are not ``0..len(lengths)-1``: one part of a split.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        global_batch_size: int,
        seed: int,
        consumed_samples: int = 0,
        group_samples: int = 0,
        documents: ArrayLike | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._documents = np.arange(len(self._lengths)) if documents is None else np.asarray(documents, dtype=np.int64)
        if len(self._lengths) == 0:
            raise ValueError("there is no document to sample from: check --data-path and --split")
        if len(self._documents) != len(self._lengths):
            raise ValueError(f"{len(self._documents)} documents have {len(self._lengths)} lengths")
        if global_batch_size < 1 or consumed_samples < 0 or group_samples < 0:
            raise ValueError(
                f"--global-batch-size {global_batch_size} must be at least 1, consumed samples {consumed_samples} and "
                f"the group size {group_samples} at least 0"
            )
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.consumed_samples = consumed_samples
        self.group_samples = group_samples
        self._length_of = dict(zip(self._documents.tolist(), self._lengths.tolist(), strict=True))
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """The next batch: document numbers."""
        batch = []
        for sample in range(self.consumed_samples, self.consumed_samples + self.global_batch_size):
            epoch, place = divmod(sample, len(self._documents))
            batch.append(int(self._documents[self._order(epoch)[place]]))
        self.consumed_samples += self.global_batch_size
        return batch

    def microbatches(self, batch: Sequence[int], micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
        """One rank's share of a batch, longest documents first so that a lack of memory shows at once.

        All ranks get like lengths at every micro-batch, and together they get every document once.

        Raises:
            ValueError: The batch does not divide into micro-batches for all ranks.
        """
        step = micro_batch_size * dp_size
        if len(batch) % step:
            raise ValueError(
                f"--global-batch-size {len(batch)} must be a multiple of --micro-batch-size * data-parallel size = "
                f"{micro_batch_size} * {dp_size} = {step}; nearest: {max(step, round(len(batch) / step) * step)}"
            )
        ranked = sorted(batch, key=lambda document: (-self._length_of[document], document))
        mine = []
        for start in range(0, len(ranked), step):
            microbatch = []
            for row in range(micro_batch_size):
                # Back and forth over the ranks, so that none always gets the longer of its neighbours.
                place = dp_rank if row % 2 == 0 else dp_size - 1 - dp_rank
                microbatch.append(ranked[start + row * dp_size + place])
            mine.append(microbatch)
        return mine

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here, and to refuse to when the order would be another."""
        return {
            "consumed_samples": self.consumed_samples,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "group_samples": self.group_samples,
            "documents_hash": self._documents_hash(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler stopped.

        Raises:
            ValueError: This sampler's order differs from the other's, so documents would repeat or be missed.
        """
        mine = self.state_dict()
        names = {
            "global_batch_size": "--global-batch-size",
            "seed": "--seed",
            "group_samples": "the length group size",
            "documents_hash": "the documents (--data-path, --split, --turns) with hash",
        }
        for key, name in names.items():
            if state[key] != mine[key]:
                raise ValueError(
                    f"cannot resume the order of samples: the checkpoint was written with {name} {state[key]} and this "
                    f"run has {mine[key]}; use the checkpoint's, or start a new run from its weights, with "
                    "--pretrained-checkpoint and another --save"
                )
        self.consumed_samples = int(state["consumed_samples"])

    def _documents_hash(self) -> str:
        return hashlib.sha256(self._documents.tobytes() + self._lengths.tobytes()).hexdigest()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's order, as places in ``documents``."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._make_order(epoch)
        return self._epoch[1]

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self._documents))
        size = self.global_batch_size
        group = max(1, round(self.group_samples / size)) * size
        if self.group_samples == 0 or group == size:
            return order
        # Batches are counted over all epochs, so the epoch's first documents may complete the last epoch's last batch.
        head = -epoch * len(order) % size
        num_batches = (len(order) - head) // size
        for start in range(head, head + num_batches * size, group):
            stop = min(start + group, head + num_batches * size)
            members = order[start:stop]
            batches = members[np.argsort(self._lengths[members], kind="stable")].reshape(-1, size)
            order[start:stop] = generator.permutation(batches).reshape(-1)
        return order
