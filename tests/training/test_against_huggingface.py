"""The whole trainer against a plain Hugging Face model and the paper's equations written out by hand.

Loss, every metric and every parameter's gradient, for documents of one to four turns and for all objectives. The oracle
computes every conversation as its own full sequence; nothing of the shared-prefix layout is in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from tests.distributed.harness import run_ranks
from tests.tiny import VOCAB, write_tiny_dataset

BETA, LAMBDA = 0.5, 0.7
ROTARY_BASE, REFERENCE_ROTARY_BASE = 1e5, 1e3
PREFERENCE = [f"--beta={BETA}", f"--lambda={LAMBDA}"]
SHORT = [f"--reference-rotary-base={REFERENCE_ROTARY_BASE}"]
CASES = {
    "longpo": ["--objective=longpo", *PREFERENCE, *SHORT],
    "longpo, mean of turns": ["--objective=longpo", *PREFERENCE, *SHORT, "--turn-reduction=mean", "--nll-weight=0.3"],
    "longpo, independent turns": ["--objective=longpo", *PREFERENCE, *SHORT, "--turns=independent"],
    "longpo, independent turns, mean": [
        *("--objective=longpo", "--turns=independent", "--turn-reduction=mean"),
        *(*PREFERENCE, *SHORT),
    ],
    "longpo, several documents a row": ["--objective=longpo", *PREFERENCE, *SHORT, "--micro-batch-size=2"],
    "dpo": ["--objective=dpo", *PREFERENCE],
    "sft-chosen": ["--objective=sft-chosen"],
    "sft-rejected": ["--objective=sft-rejected"],
    "sft-chosen-constraint": ["--objective=sft-chosen-constraint", f"--beta={BETA}", *SHORT],
    "longpo, window": ["--objective=longpo", *PREFERENCE, *SHORT],
    "longpo, window dropped": ["--objective=longpo", *PREFERENCE, *SHORT, "--window-size=full"],
    "longpo, YaRN": [
        *("--objective=longpo", "--position-embedding-type=yarn", "--yarn-rotary-scaling-factor=4"),
        *("--yarn-original-max-position-embeddings=64", *PREFERENCE, *SHORT),
    ],
}
WINDOWS = {"longpo, window": (9, 9), "longpo, window dropped": (None, 9)}
"""Windows of policy and reference, shorter than every document."""
PLAIN = {"rope_type": "default"}
ROPES = {"longpo, YaRN": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
"""RoPE of the policy; the model before training, which is the reference, has plain RoPE."""


def huggingface_model(rotary_base: float, window: int | None = None, rope: dict[str, Any] = PLAIN) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        rope_parameters={**rope, "rope_theta": rotary_base},
        sliding_window=window,
    )
    return MistralForCausalLM(config)


class Oracle:
    """Eq. 11-14 with full sequences."""

    def __init__(self, policy: Any, reference_short: Any, reference_long: Any, flags: list[str]) -> None:
        self.policy, self.reference_short, self.reference_long = policy, reference_short, reference_long
        values = dict(flag.removeprefix("--").split("=") for flag in flags)
        self.kind = values["objective"]
        self.independent = values.get("turns") == "independent"
        self.mean = values.get("turn-reduction") == "mean"
        self.nll_weight = float(values.get("nll-weight", 1))

    @staticmethod
    def tokens(model: Any, prefix: Any, branch: Any) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """All next-token log-probs of one conversation, and those of each turn's response."""
        row = torch.tensor([*prefix.tolist(), *branch.tokens.tolist()])
        logps = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
        shift = len(prefix) - 1
        return logps, {turn: logps[start + shift : end + shift] for turn, start, end in branch.spans}

    def document(self, document: Any) -> tuple[torch.Tensor, dict[str, float]]:
        pairs = document.independent if self.independent else (document.joint,)
        nll: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        policy: list[dict[int, torch.Tensor]] = [{}, {}]
        reference: list[dict[int, torch.Tensor]] = [{}, {}]
        for pair in pairs:
            for role in (0, 1):
                every, responses = self.tokens(self.policy, document.document_tokens, pair[role])
                nll[role].append(-every.mean())
                policy[role] |= responses
                if self.kind == "dpo":
                    with torch.no_grad():
                        reference[role] |= self.tokens(self.reference_long, document.document_tokens, pair[role])[1]
        if self.kind != "dpo":
            for short in document.short:
                for role, branch in enumerate((short.chosen, short.rejected)):
                    with torch.no_grad():
                        reference[role] |= self.tokens(self.reference_short, short.prefix_tokens, branch)[1]
        return self.combine({r: sum(v) / len(v) for r, v in nll.items()}, policy, reference)  # type: ignore[misc]

    def combine(self, nll: Any, policy: Any, reference: Any) -> tuple[torch.Tensor, dict[str, float]]:
        summed = [sum(x.sum() for x in policy[role].values()) for role in (0, 1)]
        if self.kind == "sft-rejected":
            return nll[1], {"longpo/nll_loss": nll[1].item(), "logps/rejected": summed[1].item()}
        metrics = {"longpo/nll_loss": nll[0].item(), "logps/chosen": summed[0].item()}
        if self.kind == "sft-chosen":
            return nll[0], metrics
        if self.kind == "sft-chosen-constraint":
            log_ratio = torch.cat([reference[0][t] - policy[0][t] for t in policy[0]])
            kl = (log_ratio.exp() - 1 - log_ratio).sum()
            return nll[0] + BETA * kl, metrics | {"longpo/kl": kl.item()}
        rewards = [[BETA * (policy[r][t].sum() - reference[r][t].sum()) for t in sorted(policy[r])] for r in (0, 1)]
        margins = torch.stack([chosen - rejected for chosen, rejected in zip(*rewards, strict=True)])
        preference = -F.logsigmoid(margins).mean() if self.mean else -F.logsigmoid(margins.sum())
        chosen, rejected = (sum(r.item() for r in side) for side in rewards)
        return LAMBDA * preference + self.nll_weight * nll[0], metrics | {
            "longpo/preference_loss": preference.item(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (margins > 0).float().mean().item() if self.mean else float(chosen > rejected),
            "logps/rejected": summed[1].item(),
        }


def compare(rank: int, name: str, data: str, folder: str) -> dict[str, Any]:
    """One global batch of four documents through the trainer and through the oracle."""
    from megatron_longpo import platform
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.conversion.load import load_hf_weights
    from megatron_longpo.data.dataset import PreferenceDataset
    from megatron_longpo.model.build import unwrap
    from megatron_longpo.training.data import MicroBatches, training_batches
    from megatron_longpo.training.distributed import initialize
    from megatron_longpo.training.initial import with_initial_model
    from megatron_longpo.training.loop import Trainer
    from megatron_longpo.training.reference import reference_logprobs
    from megatron_longpo.training.step import run_global_batch
    from megatron_longpo.validation import validate

    start, flags = Path(folder) / "start", CASES[name]
    window, reference_window = WINDOWS.get(name, (None, None))
    huggingface_model(ROTARY_BASE, reference_window).save_pretrained(start)
    rope = ROPES.get(name, PLAIN)
    policy = huggingface_model(ROTARY_BASE, window, rope)
    fixed = ["--global-batch-size=4", "--train-iters=1", "--split=100,0", "--seq-length=512", "--num-workers=0"]
    # Another reference model than that of the other cases, computed in each.
    fixed += [f"--reference-dir={folder}"] if name in WINDOWS or name in ROPES else []
    fixed += ["--progress-bar=off", "--logits-chunk-tokens=17", f"--load-hf={start}", f"--data-path={data}"]
    config = with_initial_model(parse_arguments([*fixed, *flags]))
    config = config.with_device_defaults(*platform.device_defaults())
    validate(config, 1)
    dataset = PreferenceDataset(data, config.model.vocab_size)
    initialize(config)
    trainer = Trainer(config, dataset)
    reference = None
    if config.objective.needs_reference:
        reference, _ = reference_logprobs(config, dataset, trainer.chunks, None)
    batch = next(training_batches(MicroBatches(config, dataset, reference), trainer._sampler()))
    ours, _ = run_global_batch(config, trainer.chunks, batch, forward_only=False)

    short = huggingface_model(REFERENCE_ROTARY_BASE, reference_window)
    oracle = Oracle(policy, short, huggingface_model(ROTARY_BASE, window, rope), flags)
    results = [oracle.document(dataset[number]) for number in batch.numbers]
    loss = torch.stack([result[0] for result in results]).mean()
    loss.backward()
    theirs = {"loss": loss.item()}
    for name in results[0][1]:
        theirs[name] = sum(result[1][name] for result in results) / len(results)

    # Their gradients, brought into Megatron's shapes by the checkpoint loader.
    for parameter in policy.parameters():
        parameter.data.copy_(parameter.grad)
    policy.save_pretrained(Path(folder) / "gradients")
    gradients = {name: p.main_grad.clone() for name, p in unwrap(trainer.chunks[0]).named_parameters()}
    load_hf_weights(config, trainer.chunks, Path(folder) / "gradients")
    differences = {
        name: ((gradients[name] - p.data).norm() / p.data.norm()).item()
        for name, p in unwrap(trainer.chunks[0]).named_parameters()
    }
    turns = sorted(dataset[number].num_turns for number in batch.numbers)
    parallel_state.destroy_model_parallel()
    return {"ours": ours, "theirs": theirs, "differences": differences, "turns": turns}


def compare_all(rank: int, data: str, folder: str) -> dict[str, Any]:
    return {name: compare(rank, name, data, f"{folder}/{number}") for number, name in enumerate(CASES)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("huggingface")
    data = str(write_tiny_dataset(folder / "data" / "tiny", num_documents=4, seed=5))
    return run_ranks(compare_all, 1, data, str(folder))[0]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_metrics(results: dict[str, Any], case: str) -> None:
    result = results[case]
    assert result["turns"] == [1, 2, 3, 4]
    ours, theirs = dict(result["ours"]), dict(result["theirs"])
    assert ours.keys() == theirs.keys()
    if case == "dpo":  # policy and reference are one model here: the sign of a margin of rounding errors
        ours.pop("rewards/accuracies"), theirs.pop("rewards/accuracies")
    assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient(results: dict[str, Any], case: str) -> None:
    differences = results[case]["differences"]
    assert len(differences) == 2 * 6 + 3
    assert max(differences.values()) < 1e-5, differences
