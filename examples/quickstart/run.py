"""From nothing to two trained models, a picture and an answer, on real text that every Python carries:

    make quickstart          # or: .venv/bin/python -m examples.quickstart.run

Everything lands in runs/quickstart. A stage whose inputs have not changed is skipped; to start over, remove the folder.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from examples.quickstart.stages import Stage, run_stages

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
FOLDER = Path("runs/quickstart")
ANSWER = "answer.txt"
LAYOUTS = {
    "TP 2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "CP 2": ("--context-parallel-size", "2"),
}


def stages(folder: Path = FOLDER) -> list[Stage]:
    """All stages in order, with every file below `folder`."""
    # Imported here, so that a skipped stage and `--help` do not wait for torch and transformers.
    from examples.quickstart.answer import AnswerSettings, answer_held_out
    from examples.quickstart.commands import PairsSettings, TrainingSettings, export, generate_pairs, preprocess, train
    from examples.quickstart.corpus import CorpusSettings, write_corpus
    from examples.quickstart.model import ModelSettings, pretrain_model
    from examples.quickstart.tokenizer import TokenizerSettings, train_tokenizer
    from megatron_longpo.report import plot_runs

    corpus, held, tokenizer, model = (folder / name for name in ("documents.jsonl", "held.jsonl", "tokenizer", "model"))
    pairs, prefix, report = folder / "pairs", folder / "tokens" / "pairs", folder / "report.png"
    pairs_file = pairs / "pairs.jsonl"
    tokens = tuple(prefix.with_suffix(suffix) for suffix in (".bin", ".idx", ".manifest.json"))
    runs = {name: folder / name.lower().replace(" ", "") for name in LAYOUTS}
    metrics = {name: run / "metrics.jsonl" for name, run in runs.items()}
    exported, answer = folder / "exported", folder / ANSWER
    package = REPOSITORY / "megatron_longpo"
    sources = HERE / "corpus.py"
    exercises = (HERE / "instructions.py", HERE / "instruction_template.txt", package / "generation")

    making = [
        Stage(
            "corpus",
            "documents from the language reference and the standard library",
            lambda: write_corpus(corpus, held, CorpusSettings()),
            inputs=(sources,),
            outputs=(corpus, held),
            settings=asdict(CorpusSettings()) | {"python": sys.version},
        ),
        Stage(
            "tokenizer",
            "a SentencePiece tokenizer with a chat template, trained on the corpus",
            lambda: train_tokenizer(corpus, tokenizer, TokenizerSettings()),
            inputs=(HERE / "tokenizer.py", corpus),
            outputs=(tokenizer / "tokenizer.model", tokenizer / "tokenizer.json"),
            settings=asdict(TokenizerSettings()),
        ),
        Stage(
            "model",
            "a small Mistral-shaped model, pre-trained on short rows of the corpus for about a minute",
            lambda: pretrain_model(corpus, tokenizer, model, ModelSettings()),
            inputs=(HERE / "model.py", *exercises, corpus, tokenizer),
            outputs=(model / "model.safetensors", model / "config.json"),
            settings=asdict(ModelSettings()),
        ),
        Stage(
            "pairs",
            "the model's own instructions, and its answers from a chunk (chosen) and the whole document (rejected)",
            lambda: generate_pairs(held, model, pairs, PairsSettings()),
            inputs=(HERE / "commands.py", *exercises, REPOSITORY / "tools/generate_pairs.py", held, model),
            outputs=(pairs_file,),
            settings=asdict(PairsSettings()),
        ),
        Stage(
            "preprocess",
            "pairs to tokens",
            lambda: preprocess(pairs_file, model, prefix),
            inputs=(
                HERE / "commands.py",
                package,
                REPOSITORY / "tools/preprocess_pairs.py",
                pairs_file,
                tokenizer,
            ),
            outputs=tokens,
        ),
    ]
    training = [
        Stage(
            f"train-{runs[name].name}",
            f"LongPO on two processes with {name}: reference pass, {TrainingSettings().train_iters} steps, checkpoint",
            partial(train, model, prefix, runs[name], layout, TrainingSettings()),
            inputs=(HERE / "commands.py", package, REPOSITORY / "pretrain_longpo.py", model, *tokens),
            outputs=(metrics[name], runs[name] / "checkpoint"),
            settings=asdict(TrainingSettings()) | {"layout": layout},
        )
        for name, layout in LAYOUTS.items()
    ]
    reporting = Stage(
        "report",
        "loss terms, rewards, margin and accuracy over steps",
        lambda: plot_runs(
            metrics,
            report,
            "LongPO on two processes",
            "The same global batches with tensor parallel 2 and with context parallel 2: the curves must agree.",
        ),
        inputs=(package / "report.py", *metrics.values()),
        outputs=(report,),
    )
    converter = REPOSITORY / "tools/convert_checkpoint.py"
    name, run = next(iter(runs.items()))
    leaving = [
        Stage(
            "export",
            f"the run with {name} as a Hugging Face folder",
            lambda: export(run, model, exported),
            inputs=(HERE / "commands.py", package, converter, model, run / "checkpoint"),
            outputs=(exported / "model.safetensors", exported / "config.json"),
        ),
        Stage(
            "generate",
            "transformers opens that folder, and the model answers a held-out document",
            lambda: answer_held_out(exported, pairs_file, prefix, TrainingSettings().split, answer, AnswerSettings()),
            inputs=(HERE / "answer.py", exported, pairs_file, *tokens),
            outputs=(answer,),
            settings=asdict(AnswerSettings()) | {"split": TrainingSettings().split},
        ),
    ]
    return [*making, *training, reporting, *leaving]


def main() -> None:
    """Run the stages and print the summary."""
    started = time.monotonic()
    os.chdir(REPOSITORY)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    seconds = run_stages(stages(), FOLDER / "stamps")

    from megatron_longpo.report import summary_table

    print("\nMean of the first 5 steps → mean of the last 5 steps; held-out documents: first → last evaluation\n")
    print(summary_table({name: FOLDER / name.lower().replace(" ", "") / "metrics.jsonl" for name in LAYOUTS}))
    print("\nOpened with transformers from the exported folder:\n")
    print((FOLDER / ANSWER).read_text(encoding="utf-8"), end="")
    print("\n" + " · ".join(f"{name} {took:.0f} s" for name, took in seconds.items() if took >= 0.5))
    print(f"picture: {FOLDER}/report.png · model: {FOLDER}/exported · {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
