"""One training step of TRL's DPOTrainer on the same two conversations and the same weights.

Its fused LM head is what it always uses; `max_length=None`, since its default cuts rows at 1,024 tokens; reference
log-probs computed beforehand. Its NLL term covers the response alone, ours the document too, so its LM head has less
to do.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.problem import END, Problem


class _Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.began)


def run_trl(problem: Problem, model: Path, num_steps: int) -> list[float]:
    """Train for some steps; returns the seconds of each."""
    row = problem.row()
    chosen, rejected = (_text(branch.tokens) for branch in row.branches)
    rows = Dataset.from_list([{"prompt": _text(row.prefix) + " ", "chosen": chosen, "rejected": rejected}])
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            max_length=None,
            precompute_ref_log_probs=True,
            loss_type=["sigmoid", "sft"],
            loss_weights=[0.01, 1.0],
            beta=0.1,
            max_steps=num_steps,
            per_device_train_batch_size=1,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = DPOTrainer(
            MistralForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=arguments,
            train_dataset=rows,
            processing_class=_tokenizer(problem),
            callbacks=[clock],
        )
        lengths = [len(trainer.train_dataset[0][f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
        expected = [len(row.prefix), *(len(branch.tokens) for branch in row.branches)]
        if lengths != expected:
            raise RuntimeError(f"TRL trains on {lengths} tokens, not on {expected}: its tokenization has changed")
        trainer.train()
    return clock.seconds


def _text(tokens: Any) -> str:
    return " ".join(f"<{token}>" for token in tokens)


def _tokenizer(problem: Problem) -> PreTrainedTokenizerFast:
    """Text of the form "<5> <17>" to the token ids 5, 17: TRL takes text only."""
    words = {f"<{token}>": token for token in range(problem.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"<{END}>", pad_token="<0>", unk_token="<0>")
