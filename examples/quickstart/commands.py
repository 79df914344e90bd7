"""The commands that a user types, run as they stand: pairs, preprocessing, training under torchrun, export."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.quickstart.instructions import INSTRUCTION_TEMPLATE, NUM_INSTRUCTIONS

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class TrainingSettings:
    """Flags of both training runs.

    The paper's learning rate and λ are for 7B models and thousands of steps; with these, 40 steps of a tiny one show.
    """

    train_iters: int = 40
    global_batch_size: int = 8
    lr: float = 2e-4
    preference_weight: float = 0.1
    seq_length: int = 2048
    split: str = "87,13"
    eval_interval: int = 8


@dataclass(frozen=True)
class PairsSettings:
    """Flags of the making of pairs: everything is a hundred times shorter than in real life."""

    min_document_tokens: int = 400
    target_length: int = 1800
    min_chunk_tokens: int = 90
    max_chunk_tokens: int = 200
    max_chunks_per_document: int = 2
    instructions_per_chunk: int = NUM_INSTRUCTIONS
    max_instruction_tokens: int = 64
    max_answer_tokens: int = 48
    # The tiny model often finds no end to an answer about a whole document, which here is all the better for a pair.
    filters: str = "refusal repetition language"
    instruction_template: str = str(INSTRUCTION_TEMPLATE.relative_to(REPOSITORY))


def generate_pairs(documents: Path, model: Path, folder: Path, settings: PairsSettings) -> None:
    """Let the model make its own pairs from the held documents; an earlier result is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "tools/generate_pairs.py", "--documents", str(documents), "--output", str(folder)]
    command += ["--engine", "transformers", "--model", str(model)]
    for name, value in asdict(settings).items():
        command += [f"--{name.replace('_', '-')}", *str(value).split()]
    _run(command, folder.with_suffix(".log"))


def preprocess(pairs: Path, tokenizer: Path, prefix: Path) -> None:
    """Tokenize the pairs file into `prefix`.bin, .idx and .manifest.json, in a folder of their own."""
    # An earlier model's reference log-probs lie beside an earlier dataset.
    shutil.rmtree(prefix.parent, ignore_errors=True)
    prefix.parent.mkdir(parents=True)
    command = [sys.executable, "tools/preprocess_pairs.py"]
    command += ["--input", str(pairs), "--tokenizer-model", str(tokenizer), "--output-prefix", str(prefix)]
    _run(command, prefix.with_suffix(".log"))


def train(model: Path, prefix: Path, folder: Path, layout: tuple[str, ...], settings: TrainingSettings) -> None:
    """Train from the Hugging Face weights on two processes.

    Args:
        model: Hugging Face folder to start from.
        prefix: What `preprocess` wrote.
        folder: Gets the checkpoint, metrics.jsonl, TensorBoard files and train.log; an earlier run in it is removed.
        layout: The flags that spread the work over the two processes.
        settings: The other flags.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["pretrain_longpo.py", *layout]
    flags = {
        "load-hf": model,
        "data-path": prefix,
        "split": settings.split,
        "seq-length": settings.seq_length,
        "objective": "longpo",
        "lambda": settings.preference_weight,
        "train-iters": settings.train_iters,
        "global-batch-size": settings.global_batch_size,
        # With one data-parallel rank there is nobody to finish together with, and mixed lengths make smoother curves.
        "sampler-group-samples": 0,
        "lr": settings.lr,
        "eval-interval": settings.eval_interval,
        "eval-iters": 1,
        "save": folder / "checkpoint",
        "metrics-jsonl": folder / "metrics.jsonl",
        "tensorboard-dir": folder / "tensorboard",
        "progress-bar": "on",
    }
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    _run(command, folder / "train.log")


def export(run: Path, template: Path, folder: Path) -> None:
    """Convert a run's last checkpoint into a Hugging Face folder.

    Args:
        run: Folder that `train` filled.
        template: Hugging Face folder that the run started from; gives tokenizer and chat template.
        folder: The new Hugging Face folder; an earlier one is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "tools/convert_checkpoint.py", "megatron-to-hf", "--load", str(run / "checkpoint")]
    _run([*command, "--hf-model", str(template), "--save", str(folder)], run / "export.log")


def _run(command: list[str], log: Path) -> None:
    """Run a command with its progress bar on the terminal and its lines in a log; show the log's end if it fails."""
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"      $ {' '.join(shown)}")
    print(f"      its lines go to {log}", flush=True)
    # One BLAS thread for each of two processes on two cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # PyTorch deprecates names that Megatron-Core calls; the warnings would tear up the progress bar.
    environment["PYTHONWARNINGS"] = "ignore"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=file, check=False).returncode
    if code != 0:
        print("\n".join(log.read_text(encoding="utf-8").splitlines()[-20:]), file=sys.stderr)
        sys.exit(f"quickstart: the command above ended with code {code}; its whole output is in {log}")
