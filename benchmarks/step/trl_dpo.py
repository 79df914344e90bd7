"""The same pair through TRL's DPOTrainer: fused LM head, no limit on length, reference log-probs given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.step.case import END_TOKEN, WEIGHTS, ReferenceNumbers, StepCase
from benchmarks.step.clock import StepClock

_END = "<end>"


def run_trl(case: StepCase, folder: Path, num_steps: int, clock: StepClock) -> list[float]:
    """Train on the pair with TRL; returns the loss of every step."""
    trainer = DPOTrainer(
        model=LlamaForCausalLM.from_pretrained(
            folder / WEIGHTS, dtype=torch.bfloat16 if case.bf16 else torch.float32, attn_implementation="sdpa"
        ),
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            max_length=None,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=case.bf16,
            use_cpu=case.device == "cpu",
            per_device_train_batch_size=1,
            max_steps=num_steps,
            learning_rate=5e-7,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([_texts(case)]),
        processing_class=_tokenizer(case),
    )
    # What TRL precomputed are the policy's own log-probs, and the loss then 0.69 whatever the step computes.
    given = ReferenceNumbers(case).of(0)[0]
    columns = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ([float(x.sum())] for x in given), strict=True))
    dataset = trainer.train_dataset.remove_columns(list(columns))
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    trainer.train_dataset = dataset
    _check_tokens(case, dataset[0])
    recorder = _Recorder(clock)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.losses


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Starts and stops the clock around forward, backward and optimizer."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock; transformers calls it before a step's first micro-batch."""
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock; the optimizer has stepped."""
        self.clock.stop()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep the loss of a step; what transformers logs at the end of training has none."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def _word(token: int) -> str:
    return _END if token == END_TOKEN else f"w{token}"


def _tokenizer(case: StepCase) -> PreTrainedTokenizerFast:
    """One word per token."""
    words = Tokenizer(WordLevel({_word(token): token for token in range(case.vocab_size)}, unk_token=_END))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=_END, pad_token=_END)


def _texts(case: StepCase) -> dict[str, str]:
    document = case.document()
    assert document.joint is not None
    answers = {
        name: " " + " ".join(map(_word, branch.tokens))
        for name, branch in zip(("chosen", "rejected"), document.joint, strict=True)
    }
    return {"prompt": " ".join(map(_word, document.document_tokens)), **answers}


def _check_tokens(case: StepCase, example: dict[str, Any]) -> None:
    """TRL sees the tokens that we see."""
    document = case.document()
    assert document.joint is not None
    assert example["prompt_ids"] == document.document_tokens.tolist()
    for name, branch in zip(("chosen_ids", "rejected_ids"), document.joint, strict=True):
        assert example[name] == branch.tokens.tolist()
