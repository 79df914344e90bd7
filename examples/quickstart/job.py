"""The quickstart's stages in order, and where each of them leaves what it makes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from examples.quickstart.answer import AnswerSettings, answer_held_out
from examples.quickstart.commands import PairsSettings, TrainingSettings, export, generate_pairs, preprocess, train
from examples.quickstart.corpus import CorpusSettings, write_corpus
from examples.quickstart.model import ModelSettings, pretrain_model
from examples.quickstart.stages import Stage
from examples.quickstart.tokenizer import TokenizerSettings, train_tokenizer
from megatron_longpo.report import plot_runs

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PACKAGE = REPOSITORY / "megatron_longpo"
EXERCISES = (HERE / "instructions.py", HERE / "instruction_template.txt", PACKAGE / "generation")

# Relative to the repository.
FOLDER = Path("runs/quickstart")
CORPUS, HELD = FOLDER / "documents.jsonl", FOLDER / "held.jsonl"
TOKENIZER, MODEL = FOLDER / "tokenizer", FOLDER / "model"
PAIRS = FOLDER / "pairs"
PAIRS_FILE = PAIRS / "pairs.jsonl"
PREFIX = FOLDER / "tokens" / "pairs"
TOKENS = tuple(PREFIX.with_suffix(suffix) for suffix in (".bin", ".idx", ".manifest.json"))
LAYOUTS = {
    "TP 2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "CP 2": ("--context-parallel-size", "2"),
}
RUNS = {name: FOLDER / name.lower().replace(" ", "") for name in LAYOUTS}
METRICS = {name: run / "metrics.jsonl" for name, run in RUNS.items()}
REPORT = FOLDER / "report.png"
EXPORTED, ANSWER = FOLDER / "exported", FOLDER / "answer.txt"


def stages() -> list[Stage]:
    """All stages in order."""
    return [*_model(), *_pairs(), *_runs(), *_results()]


def _model() -> list[Stage]:
    return [
        Stage(
            "corpus",
            "documents from the language reference and the standard library",
            lambda: write_corpus(CORPUS, HELD, CorpusSettings()),
            inputs=(HERE / "corpus.py",),
            outputs=(CORPUS, HELD),
            settings=asdict(CorpusSettings()) | {"python": sys.version},
        ),
        Stage(
            "tokenizer",
            "a SentencePiece tokenizer with a chat template, trained on the corpus",
            lambda: train_tokenizer(CORPUS, TOKENIZER, TokenizerSettings()),
            inputs=(HERE / "tokenizer.py", CORPUS),
            outputs=(TOKENIZER / "tokenizer.model", TOKENIZER / "tokenizer.json"),
            settings=asdict(TokenizerSettings()),
        ),
        Stage(
            "model",
            "a small Mistral-shaped model, pre-trained on short rows of the corpus for about a minute",
            lambda: pretrain_model(CORPUS, TOKENIZER, MODEL, ModelSettings()),
            inputs=(HERE / "model.py", *EXERCISES, CORPUS, TOKENIZER),
            outputs=(MODEL / "model.safetensors", MODEL / "config.json"),
            settings=asdict(ModelSettings()),
        ),
    ]


def _pairs() -> list[Stage]:
    return [
        Stage(
            "pairs",
            "the model's own instructions, and its answers from a chunk (chosen) and the whole document (rejected)",
            lambda: generate_pairs(HELD, MODEL, PAIRS, PairsSettings()),
            inputs=(HERE / "commands.py", *EXERCISES, REPOSITORY / "tools/generate_pairs.py", HELD, MODEL),
            outputs=(PAIRS_FILE,),
            settings=asdict(PairsSettings()),
        ),
        Stage(
            "preprocess",
            "pairs to tokens",
            lambda: preprocess(PAIRS_FILE, MODEL, PREFIX),
            inputs=(HERE / "commands.py", PACKAGE, REPOSITORY / "tools/preprocess_pairs.py", PAIRS_FILE, TOKENIZER),
            outputs=TOKENS,
        ),
    ]


def _runs() -> list[Stage]:
    return [
        Stage(
            f"train-{RUNS[name].name}",
            f"LongPO on two processes with {name}: reference pass, {TrainingSettings().train_iters} steps, checkpoint",
            partial(train, MODEL, PREFIX, RUNS[name], layout, TrainingSettings()),
            inputs=(HERE / "commands.py", PACKAGE, REPOSITORY / "pretrain_longpo.py", MODEL, *TOKENS),
            outputs=(METRICS[name], RUNS[name] / "checkpoint"),
            settings=asdict(TrainingSettings()) | {"layout": layout},
        )
        for name, layout in LAYOUTS.items()
    ]


def _results() -> list[Stage]:
    name, run = next(iter(RUNS.items()))
    title = "LongPO on two processes"
    subtitle = "The same global batches with tensor parallel 2 and with context parallel 2: the curves must agree."
    split = TrainingSettings().split
    return [
        Stage(
            "report",
            "loss terms, rewards, margin and accuracy over steps",
            lambda: plot_runs(METRICS, REPORT, title, subtitle),
            inputs=(PACKAGE / "report.py", *METRICS.values()),
            outputs=(REPORT,),
        ),
        Stage(
            "export",
            f"the run with {name} as a Hugging Face folder",
            lambda: export(run, MODEL, EXPORTED),
            inputs=(
                HERE / "commands.py",
                PACKAGE,
                REPOSITORY / "tools/convert_checkpoint.py",
                MODEL,
                run / "checkpoint",
            ),
            outputs=(EXPORTED / "model.safetensors", EXPORTED / "config.json"),
        ),
        Stage(
            "generate",
            "transformers opens that folder, and the model answers a held-out document",
            lambda: answer_held_out(EXPORTED, PAIRS_FILE, PREFIX, split, ANSWER, AnswerSettings()),
            inputs=(HERE / "answer.py", EXPORTED, PAIRS_FILE, *TOKENS),
            outputs=(ANSWER,),
            settings=asdict(AnswerSettings()) | {"split": split},
        ),
    ]
