"""The ``dpo`` objective against TRL's own trainer: loss, metrics and the gradient of every weight of a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_longpo.config import ObjectiveConfig
from megatron_longpo.data.predictions import Predictions
from megatron_longpo.objective.logprobs import linear_logprobs
from megatron_longpo.objective.losses import objective_loss

WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]
PAIRS = {
    "prompt": ["a b c d e f g h i j k", "l m n"],
    "chosen": [" o p q r", " s t u v w x y"],
    "rejected": [" z a", " b c d"],
}
BETA = 0.3


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            attn_implementation="eager",
        )
    )


@pytest.fixture(scope="module")
def trl_result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The batch of both pairs, and TRL's loss, metrics and gradients on it."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}))
    words.pre_tokenizer = WhitespaceSplit()
    trainer = DPOTrainer(
        model=small_model(0),
        ref_model=small_model(1),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            beta=BETA,
            max_length=None,
            per_device_train_batch_size=2,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )
    trainer.model.eval()  # like ours, without dropout
    examples = sorted(trainer.train_dataset, key=lambda example: -len(example["prompt_ids"]))
    batch = trainer.data_collator(examples)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return {
        "batch": batch,
        "loss": loss.detach(),
        "metrics": {name: values[0] for name, values in trainer._metrics["eval"].items()},
        "gradients": {name: p.grad for name, p in trainer.model.named_parameters()},
    }


def our_logps(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], predicted: torch.Tensor) -> torch.Tensor:
    """Log-probs of the predicted positions ``[4, S]`` (True at the target), from one row of all sequences."""
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    source_index = predicted.flatten().nonzero()[:, 0] - 1
    return linear_logprobs(
        hidden.flatten(0, 1),
        model.lm_head.weight,
        source_index,
        batch["input_ids"][predicted],
        vocab_size=model.config.vocab_size,
        chunk_tokens=5,
    )


def test_dpo_equals_trl(trl_result: dict[str, Any]) -> None:
    batch = trl_result["batch"]
    predicted = batch["completion_mask"].bool()  # TRL's order: both chosen sequences, then both rejected ones
    assert predicted.sum() == 4 + 7 + 2 + 3 + 4, "answers and their ends, as the pairs above have them"
    sequence = predicted.nonzero()[:, 0]
    with torch.no_grad():
        reference_logps = our_logps(small_model(1), batch, predicted)
    num_predictions = len(sequence)
    predictions = Predictions(
        source_index=torch.arange(num_predictions),
        targets=batch["input_ids"][predicted],
        nll_weight=torch.zeros(num_predictions),
        document_index=sequence % 2,
        response_slot=(sequence % 2) * 2 + sequence // 2,
        reference_logps=reference_logps,
        num_documents=2,
        max_turns=1,
        turn_mask=torch.ones(2, 1, dtype=torch.bool),
    )
    model = small_model(0)
    config = ObjectiveConfig(objective="dpo", beta=BETA, preference_weight=1.0, nll_weight=0.0)
    losses, metrics = objective_loss(config, our_logps(model, batch, predicted), predictions)
    losses.mean().backward()
    torch.testing.assert_close(losses.mean().detach(), trl_result["loss"], rtol=1e-5, atol=0)
    assert 0.1 < trl_result["loss"] < 10, "a loss of a saturated sigmoid would compare nothing"
    for name, values in metrics.items():
        if not name.startswith("longpo/"):
            assert values.mean().item() == pytest.approx(trl_result["metrics"][name], rel=1e-5), name
    for name, parameter in model.named_parameters():
        gradient = trl_result["gradients"][name]
        difference = (parameter.grad - gradient).abs().max() / gradient.abs().max()
        assert difference < 1e-4, f"{name}: {difference}"
