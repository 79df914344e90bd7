"""A run that is stopped again and again and goes on under other layouts makes the steps of an uninterrupted one.

Every stage is lost one step after its last checkpoint, so that step is made again under the next layout. The order of
documents does not fit the batch: epochs end inside of steps, and the last ones fill no whole group of like lengths.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import fresh_world, run_ranks
from tests.distributed.nccl_order import check_nccl_order, noted_operations
from tests.distributed.parallel_load import parallel_load
from tests.tiny import MODEL_FLAGS, write_tiny_dataset
from tests.training.commands import metrics

EPOCHS, BATCH = 5, 4
TP, PP, CP = "--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--context-parallel-size=2"
STAGES = {
    "DP 4": [],
    "TP 2 + sequence parallel": [TP, "--sequence-parallel"],
    "interleaved PP 2": [PP, "--num-layers-per-virtual-pipeline-stage=1"],
    "PP 2 x CP 2": [PP, CP],
    "DP 2 of two documents a row": [TP, "--micro-batch-size=2"],
}
OPTIMIZERS = {"plain": [], "distributed": ["--use-distributed-optimizer"]}
COMMON = [
    *(flag for flag in MODEL_FLAGS if "divisible" not in flag),
    "--make-vocab-size-divisible-by=4",  # 204 rows, and 208 over two ranks
    "--seq-length=512",
    f"--global-batch-size={BATCH}",
    f"--train-epochs={EPOCHS}",
    "--sampler-group-samples=8",
    "--split=75,25",
    "--eval-interval=2",
    "--save-interval=2",
    "--num-workers=0",
    "--progress-bar=off",
    "--lr=2e-3",
    "--lambda=0.5",
]
COMPARED = ("loss", "grad_norm", "learning_rate", "rewards/margins", "longpo/nll_loss")


class Lost(BaseException):
    """What ends a stage without another word, as a kill does."""


def run_stages(rank: int, stages: list[list[str]], folder: str, world: int) -> list[list[dict[str, Any]]]:
    """Run command lines after one another, all but the last lost after three steps.

    Returns:
        Of every stage what it trained on and communicated, then its steps: documents of the batch, this rank's, and
        metrics.
    """
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.training import loop
    from megatron_longpo.training.distributed import initialize, shut_down
    from megatron_longpo.training.outputs import own_outputs
    from megatron_longpo.training.prepare import open_dataset, prepared

    class Recording(loop.Trainer):
        def _step(self, batch: Any) -> Any:
            if len(seen) == 3 and number < len(stages) - 1:
                raise Lost
            metrics, bad = super()._step(batch)
            mine = [document for part in batch.micro_batches for document in part.numbers]
            row = {"iteration": self.progress.iteration, "numbers": batch.numbers, "mine": mine}
            seen.append(row | {name: metrics[name] for name in COMPARED})
            return metrics, bad

    results = []
    for number, flags in enumerate(stages):
        fresh_world(f"{folder}/rendezvous-{world}-{number}", rank, world)
        seen: list[dict[str, Any]] = []
        config = prepared(parse_arguments(flags))
        dataset = open_dataset(config)
        initialize(config)
        with own_outputs(config), parallel_load(), noted_operations() as operations:
            trainer = Recording(config, dataset)
            with contextlib.suppress(Lost):
                trainer.train()
        shut_down()
        results.append([{"trained_on": trainer.train_numbers, "operations": operations}, *seen])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_elastic_run_makes_the_steps_of_an_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data" / "tiny", num_documents=15)
    common = [*COMMON, *OPTIMIZERS[optimizer], f"--data-path={data}"]
    alone = [*common, f"--save={tmp_path / 'alone'}", f"--metrics-jsonl={tmp_path / 'alone.jsonl'}"]
    ((first, *golden),) = run_ranks(run_stages, 1, [alone], str(tmp_path), 1)[0]
    trained_on = sorted(first["trained_on"])
    order = [document for step in golden for document in step["numbers"]]
    assert len(trained_on) == 11 and len(order) == 52  # 3 of 55 fill no step
    for start in range(0, 44, 11):
        assert sorted(order[start : start + 11]) == trained_on
    assert set(order[44:]) < set(trained_on) and len(set(order[44:])) == 8

    # The first checkpoint is the uninterrupted run's: random weights depend on the layout.
    start = tmp_path / "alone" / "iter_0000002"
    save = ["--save", str(tmp_path / "moved"), f"--metrics-jsonl={tmp_path / 'moved.jsonl'}"]
    stages = [[*common, *layout, *save, "--load", str(tmp_path / "moved")] for layout in STAGES.values()]
    stages[0][-1] = str(start)
    ranks = run_ranks(run_stages, 4, stages, str(tmp_path), 4)
    for number, name in enumerate(STAGES):
        check_nccl_order([rank[number][0]["operations"] for rank in ranks])
        steps = [rank[number][1:] for rank in ranks]
        first_step = 2 * number + 3
        last = len(golden) if number == len(STAGES) - 1 else first_step + 2
        assert [step["iteration"] for step in steps[0]] == list(range(first_step, last + 1))
        for same_step in zip(*steps, strict=True):
            expected = golden[same_step[0]["iteration"] - 1]
            assert {document for rank in same_step for document in rank["mine"]} == set(expected["numbers"])
            for rank in same_step:
                assert rank["numbers"] == expected["numbers"]
                for value in COMPARED:
                    assert rank[value] == pytest.approx(expected[value], rel=1e-5, abs=1e-5), (name, value)
    evaluations = [
        [(line["iteration"], line["eval/loss"]) for line in metrics(tmp_path / f"{name}.jsonl") if "eval/loss" in line]
        for name in ("alone", "moved")
    ]
    assert [iteration for iteration, _ in evaluations[0]] == [2, 4, 6, 8, 10, 12, 13]
    for ours, theirs in zip(evaluations[1], evaluations[0][1:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
