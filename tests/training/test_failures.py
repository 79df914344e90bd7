"""What goes wrong in real runs: samples that are not finite, full disks, missing and foreign files."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_longpo.files import folder_lock
from tests.distributed.harness import run_ranks
from tests.tiny import MODEL_FLAGS, write_tiny_dataset
from tests.training.commands import FLAGS, metrics, run_in_one_process, train, train_forked

POISONED = 3
LENGTH = ["--train-iters=8", "--lr=1e-3"]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with finished reference log-probs, of which one document's are not a number."""
    prefix = write_tiny_dataset(tmp_path_factory.mktemp("poisoned") / "tiny", num_documents=10)
    train_forked(f"--data-path={prefix}", *LENGTH, f"--save={prefix.parent / 'save'}")
    sidecar = prefix.parent / "tiny.reference-short"
    lengths, logps = np.load(sidecar / "lengths.npy"), np.load(sidecar / "logps.npy")
    start = lengths[lengths[:, 0] < POISONED, 1:].sum()
    logps[start] = np.nan
    np.save(sidecar / "logps.npy", logps)
    return prefix


def test_steps_that_are_not_finite_are_skipped_on_all_ranks(poisoned: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    output = train(f"--data-path={poisoned}", *LENGTH, f"--metrics-jsonl={path}", ranks=2)
    assert f"was skipped: loss or gradient is not finite in tiny-{POISONED}\n" in output
    steps = metrics(path)
    broken = [step for step in steps if step["loss"] is None]
    assert len(steps) == 8 and steps[-1]["skipped_steps"] == len(broken) > 0
    # Weights stayed clean: all other steps are finite.
    assert all((step["grad_norm"] is None) == (step in broken) for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_that_has_skipped_every_step_goes_on(poisoned: Path, tmp_path: Path, optimizer: str) -> None:
    """Its optimizer has made no state that a checkpoint could hold."""
    # The first of three batches has the poisoned document.
    common = [*FLAGS, f"--data-path={poisoned}", "--global-batch-size=4", "--train-iters=3", "--lr=1e-3"]
    common.append(f"--optimizer={optimizer}")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("whole", "parts")}
    save = [f"--save={tmp_path / 'save'}", f"--load={tmp_path / 'save'}", f"--metrics-jsonl={files['parts']}"]
    runs = ([f"--metrics-jsonl={files['whole']}"], [*save, "--exit-interval=1"], save)
    for code, output in run_in_one_process([("pretrain_longpo.py", [*common, *flags]) for flags in runs]):
        assert code == 0, output[-3000:]
    for step, expected in zip(metrics(files["parts"]), metrics(files["whole"]), strict=True):
        assert (step["grad_norm"] is None) == (step["iteration"] == 1)
        assert all(step[key] == expected[key] for key in ("loss", "grad_norm", "learning_rate", "skipped_steps"))


def test_too_many_skipped_steps_stop_the_run_and_name_the_samples(mistakes: dict[str, tuple[int, str]]) -> None:
    code, output = mistakes["poisoned"]
    assert code == 1
    assert f"(--max-skipped-steps 0); samples of the last one: tiny-{POISONED}" in output
    assert "Traceback" not in output


def fill_the_disk(rank: int, data: str, folder: str) -> dict[str, Any]:
    """Save with no limit, then with files limited to sizes that weights and what stands beside them do not fit into."""
    from megatron_longpo import platform
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.model.build import build_model, unwrap
    from megatron_longpo.training.checkpoint import Checkpointer, Progress
    from megatron_longpo.training.checkpoint_folder import find_checkpoint
    from megatron_longpo.training.distributed import initialize

    config = parse_arguments([*MODEL_FLAGS, f"--data-path={data}", f"--save={folder}"])
    config = config.with_device_defaults(*platform.device_defaults())
    initialize(config)
    chunks = build_model(config)
    Checkpointer(config, chunks).save(Progress(iteration=1, consumed_samples=5))
    weights = [p.detach().clone() for p in unwrap(chunks[0]).parameters()]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    errors = []
    for limit in (20_000, 1_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            Checkpointer(config, chunks).save(Progress(iteration=2))
        except OSError as caught:
            errors.append(str(caught))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for parameter in unwrap(chunks[0]).parameters():
        parameter.data.zero_()
    found = find_checkpoint(folder)
    assert found is not None
    progress = Checkpointer(config, chunks).load(found)
    same = all(torch.equal(a, b) for a, b in zip(weights, unwrap(chunks[0]).parameters(), strict=True))
    visible = sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith("."))
    Checkpointer(config, chunks).save(Progress(iteration=3))
    hidden = [p.name for p in Path(folder).iterdir() if p.name.startswith(".")]
    # As a kill leaves it between a first checkpoint and the tracker, and half a checkpoint of another program.
    Path(folder, "latest_checkpointed_iteration.txt").unlink()
    Path(folder, "iter_0000009").mkdir()
    untracked = find_checkpoint(folder)
    result = {"errors": errors, "found": found.name, "consumed": progress.consumed_samples, "same": same}
    result["processes"] = [child.cmdline() for child in psutil.Process().children()]
    return result | {"files": visible, "left behind": hidden, "untracked": untracked}


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data" / "tiny", num_documents=2)
    result = run_ranks(fill_the_disk, 1, str(data), str(tmp_path / "save"))[0]
    assert ["Earlier checkpoints are as they were" in error for error in result["errors"]] == [True, True]
    # Of the two writers, one fails at a tensor and one at what torch.save puts around it.
    assert "File too large" in result["errors"][0] or "is the disk full?" in result["errors"][0]
    assert result["files"] == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert result["left behind"] == []
    assert result["processes"] == []  # a save that is waited for starts none
    assert (result["found"], result["consumed"], result["same"]) == ("iter_0000001", 5, True)
    assert result["untracked"] == tmp_path / "save" / "iter_0000003"


COMMON = [
    *MODEL_FLAGS,
    "--global-batch-size=2",
    "--train-iters=1",
    "--split=80,20",
    "--eval-iters=0",
    "--num-workers=0",
]
SFT = ["--objective=sft-chosen"]
MISTAKES = {
    "no dataset": (1, ["--data-path=nowhere/data"], "nowhere/data.manifest.json"),
    "nothing to load": (1, ["--load=nowhere"], "--load nowhere holds no checkpoint"),
    "flag without effect": (2, ["--beta=0.5", *SFT], "--beta 0.5 has no effect"),
    "too few ranks": (2, ["--tensor-model-parallel-size=2"], "--tensor-model-parallel-size"),
    "vocabulary": (1, ["--vocab-size=100"], "token id"),
    "length": (1, ["--seq-length=16"], "above --seq-length 16"),
    # The step that is made takes others.
    "length of a later one": (1, [*SFT, "--seq-length=62"], "'tiny-3' has a conversation of 63 tokens, above --seq-l"),
    "no data": (2, ["--data-path="], "--data-path is required: the PREFIX that tools/preprocess_pairs.py wrote"),
    "no shape": (1, ["--load=nowhere", "--use-checkpoint-args"], "neither --load nor --pretrained-checkpoint holds a"),
    "unknown flag": (2, ["--learning-rate=1"], "--learning-rate is not a flag"),
    "other shape": (1, [*SFT, "--load={save}", "--hidden-size=64"], "--hidden-size is 64, the checkpoint's is 32"),
    "other optimizer": (
        1,
        [*SFT, "--load={save}", "--use-distributed-optimizer"],
        "another kind of optimizer: --use-distributed-optimizer is True, the checkpoint's is False",
    ),
    "a reference in mid-run": (
        1,
        ["--load={save}", "--save={save}"],
        "at iteration 1 of an objective without a reference model, and --objective longpo has one",
    ),
    "a reference that is gone": (
        1,
        ["--data-path={data}", "--load={run}", "--train-iters=9", "--lr=1e-3", "--reference-dir={half}"],
        "half/tiny.reference-short holds no reference log-probs, and this run's weights have moved on from the ref",
    ),
    "damaged weights": (
        1,
        [*SFT, "--load={damaged}"],
        "FOLDER/damaged/iter_0000008 cannot be loaded: EOFError. If it is",
    ),
    "half a checkpoint": (1, [*SFT, "--load={half}"], "is not a torch_dist checkpoint"),
    "broken tracker": (1, [*SFT, "--load={broken}"], "expected an iteration number or 'release', got 'ten'"),
    "save is a file": (1, [*SFT, "--save={file}"], "--save FOLDER/file is a file: give a folder"),
    "save cannot be made": (1, [*SFT, "--save=/proc/run"], "--save /proc/run cannot be written"),
    "save of another run": (1, [*SFT, "--save={save}"], "holds the checkpoints of another run (the newest is iter_"),
    "other run fine-tuned": (
        1,
        [*SFT, "--save={save}", "--load={save}/iter_0000001", "--finetune"],
        "give --pretrained-checkpoint FOLDER/save/iter_0000001 --load FOLDER/save in place of --load FOLDER/save/iter_",
    ),
    "save of a running one": (1, [*SFT, "--save={locked}"], "--save FOLDER/locked: another run is writing its check"),
    "reference of a running one": (
        1,
        ["--reference-dir={locked}"],
        "FOLDER/locked/tiny.reference-short: another run is computing reference log-probs there",
    ),
    "reference where nothing can be written": (
        1,
        ["--reference-dir=/proc/run", "--load={damaged}"],  # found before weights are read
        "/proc/run/tiny.reference-short cannot be written (No such file or directory): give another --reference-dir",
    ),
    "metrics over a file": (
        1,
        [*SFT, "--metrics-jsonl={file}"],
        "--metrics-jsonl FOLDER/file is no file of metrics (see its line 1)",
    ),
    "metrics in a folder": (1, [*SFT, "--metrics-jsonl={half}"], "--metrics-jsonl FOLDER/half is a folder"),
    "TensorBoard in a file": (1, [*SFT, "--tensorboard-dir={file}"], "--tensorboard-dir FOLDER/file is a file"),
    "traces in a file": (
        1,
        [*SFT, "--profile", "--profile-step-start=0", "--profile-dir={file}"],
        "--profile-dir FOLDER/file is a file",
    ),
    "damaged tokens": (1, [*SFT, "--data-path={truncated}"], "truncated"),
}


@pytest.fixture(scope="module")
def mistakes(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Every mistake made once, in one process."""
    folder = tmp_path_factory.mktemp("mistakes")
    names = ("save", "half", "broken", "truncated", "file", "locked", "poisoned", "damaged")
    places = {name: folder / name for name in names}
    places |= {"data": poisoned, "run": poisoned.parent / "save"}
    places["file"].write_text("mine")
    shutil.copytree(poisoned.parent / "save", places["damaged"])
    for weights in places["damaged"].glob("iter_*/*.distcp"):
        os.truncate(weights, weights.stat().st_size // 2)
    for name, text in (("half", "7"), ("broken", "ten")):
        places[name].mkdir()
        (places[name] / "latest_checkpointed_iteration.txt").write_text(text)
    write_tiny_dataset(places["truncated"], num_documents=4)
    bin_file = places["truncated"].with_name("truncated.bin")
    bin_file.write_bytes(bin_file.read_bytes()[:-40])
    data = f"--data-path={write_tiny_dataset(folder / 'tiny', num_documents=4)}"
    foreign = [*MODEL_FLAGS, f"--data-path={poisoned}", "--seed=99"]
    background = [f"--save={places['poisoned']}", "--save-interval=1", "--async-save"]
    commands = [
        ("pretrain_longpo.py", [*COMMON, *SFT, data, f"--save={places['save']}"]),
        ("tools/compute_reference_logprobs.py", foreign),
        ("pretrain_longpo.py", [*FLAGS, f"--data-path={poisoned}", *LENGTH, "--max-skipped-steps=0", *background]),
        ("pretrain_longpo.py", [*COMMON, *SFT, data, "--train-iters=3", "--exit-interval=1", "--log-interval=2"]),
        ("tools/compute_reference_logprobs.py", [*COMMON, data, "--dry-run"]),
        ("tools/compute_reference_logprobs.py", [*COMMON, data, *SFT]),
    ]
    for _, flags, _ in MISTAKES.values():
        commands.append(("pretrain_longpo.py", [*COMMON, data, *(flag.format(**places) for flag in flags)]))
    sidecar = places["locked"] / "tiny.reference-short"
    sidecar.mkdir(parents=True)
    with folder_lock(places["locked"], ""), folder_lock(sidecar, ""):
        results = run_in_one_process(commands)
    assert results[0][0] == 0, results[0][1]
    assert not list(folder.glob("*reference*/manifest.json"))
    assert places["file"].read_text() == "mine"
    # The run that stopped at a bad step has finished the checkpoint that it was writing.
    last = results[2][1].rpartition("saving checkpoint at iteration ")[2].split()[0]
    assert (places["poisoned"] / "latest_checkpointed_iteration.txt").read_text() == last
    results = [(code, output.replace(str(folder), "FOLDER")) for code, output in results]
    others = ["saved", "foreign reference", "poisoned", "unsaved", "dry reference", "no reference"]
    return dict(zip([*others, *MISTAKES], results, strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_a_message(mistakes: dict[str, tuple[int, str]], name: str) -> None:
    expected, _, message = MISTAKES[name]
    code, output = mistakes[name]
    assert message in output and "Traceback" not in output
    assert code == expected


def test_reference_of_another_model_is_refused(mistakes: dict[str, tuple[int, str]]) -> None:
    code, output = mistakes["foreign reference"]
    assert code == 1
    assert "were made from something else: weights" in output and "--reference-dir" in output


def test_the_reference_pass_refuses_runs_that_it_is_not_for(mistakes: dict[str, tuple[int, str]]) -> None:
    code, output = mistakes["dry reference"]
    assert code == 2 and "error: --dry-run is for pretrain_longpo.py: this command has none\n" in output
    code, output = mistakes["no reference"]
    assert code == 2 and "error: --objective sft-chosen has no reference model: nothing to compute\n" in output


def test_a_run_that_leaves_without_a_folder_says_so_and_reports_its_last_steps(
    mistakes: dict[str, tuple[int, str]],
) -> None:
    code, output = mistakes["unsaved"]
    assert code == 0
    assert f" iteration {1:8d}/{3:8d} | consumed samples" in output
    assert "leaving after iteration 1: --exit-interval 1 was reached; nothing is saved without --save" in output
