"""Comparing a checkpoint with a Hugging Face folder: every tensor bit for bit, and logits at several parallel sizes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_longpo.conversion.hf_config import HFModel, read_hf_folder
from megatron_longpo.conversion.hf_export import exported_config, refuse_other_template, write_config
from megatron_longpo.conversion.hf_weights import HFWeights
from megatron_longpo.conversion.plan import planned_weights
from megatron_longpo.conversion.stored_model import StoredModel

NUM_TOKENS = 64
"""Random tokens of which logits are compared, beyond the window of a model that has one."""

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass
class TensorRow:
    """The tensors of one name over all layers.

    Args:
        name: With ``*`` for the layer.
        num_tensors, num_differing: How many there are, and how many are not equal bit for bit.
        largest: Greatest absolute difference, in fp32.
        dtypes: Type; Hugging Face's and Megatron's where they differ.
    """

    name: str
    num_tensors: int = 0
    num_differing: int = 0
    largest: float = 0.0
    dtypes: str = ""


@dataclass(frozen=True)
class LogitsRow:
    """Logits of random tokens at one pair of parallel sizes, against transformers', both computed in fp32."""

    sizes: str
    num_tokens: int
    largest: float
    largest_logit: float
    same_argmax: float


def compare_tensors(hf_model: str | Path, megatron: str | Path) -> list[TensorRow]:
    """Compare every tensor; one parameter is in memory at a time.

    Raises:
        ValueError: One of the two is damaged, or they are of different models.
    """
    template = read_hf_folder(hf_model)
    stored = StoredModel(megatron, template.family)
    refuse_other_template(template, stored.model, hf_model, stored.checkpoint)
    rows: dict[str, TensorRow] = {}
    with HFWeights(hf_model) as files:
        weights = planned_weights(template.family, template.model, files)
        total = sum(files.tensors[name].num_bytes for weight in weights for name in weight.hf)
        with tqdm(total=total, desc="comparing", unit="B", unit_scale=True) as progress:
            for weight in weights:
                for name, ours in zip(weight.hf, stored.read(weight), strict=True):
                    pattern = name.replace(f".{weight.layer}.", ".*.", 1)
                    _add(rows.setdefault(pattern, TensorRow(pattern)), files[name][:], ours)
                    progress.update(files.tensors[name].num_bytes)
                files.release()
    return list(rows.values())


def _add(row: TensorRow, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    row.num_tensors += 1
    row.dtypes = " / ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in (theirs, ours)))
    same = theirs.dtype == ours.dtype and _bits(theirs).equal(_bits(ours))
    if not same:
        row.num_differing += 1
        row.largest = max(row.largest, (theirs.float() - ours.float()).abs().max().item())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def compare_logits(hf_model: str | Path, megatron: str | Path, sizes: Sequence[str]) -> Iterator[LogitsRow]:
    """Compare logits of random tokens at positions spread over the model's whole length.

    Both sides compute in fp32 from their stored weights, with the checkpoint's RoPE and window. Every run has its own
    processes.

    Args:
        hf_model: Weights and template.
        megatron: The checkpoint.
        sizes: ``tp=2,pp=2`` and the like, one run each.
    """
    parsed = [parse_sizes(text) for text in sizes]
    template = read_hf_folder(hf_model)
    stored = StoredModel(megatron, template.family)
    generator = torch.Generator().manual_seed(0)
    length = stored.model.max_position_embeddings
    # A window counts tokens, in transformers too: their positions may lie anywhere.
    num_tokens = NUM_TOKENS + (stored.model.window_size.num_tokens or 0)
    positions = torch.randperm(length, generator=generator)[:num_tokens].sort().values
    tokens = torch.randint(0, stored.model.vocab_size, (len(positions),), generator=generator)
    expected = _hf_logits(template, stored, hf_model, tokens, positions)
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder, "inputs.pt"), Path(folder, "logits.pt")
        torch.save({"tokens": tokens, "positions": positions}, inputs)
        for text, (tp, pp) in zip(sizes, parsed, strict=True):
            _run_split(stored.checkpoint, tp, pp, inputs, output)
            found = torch.load(output, weights_only=True)
            same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
            yield LogitsRow(text, len(found), (found - expected).abs().max().item(), expected.abs().max().item(), same)


def refuse_impossible_sizes(hf_model: str | Path, sizes: Sequence[str]) -> None:
    """Raise ValueError where a model cannot be divided as ``tp=2,pp=2`` and the like ask for."""
    model = read_hf_folder(hf_model).model
    for text in sizes:
        tp, pp = parse_sizes(text)
        for name, size, what, count in (
            ("tp", tp, "attention heads", model.num_attention_heads),
            ("tp", tp, "key/value heads", model.num_query_groups),
            ("pp", pp, "layers", model.num_layers),
        ):
            if count % size:
                raise ValueError(f"--torchrun {text}: {name}={size} must divide the model's {count} {what}")


def parse_sizes(text: str) -> tuple[int, int]:
    """Tensor- and pipeline-parallel size from ``tp=2,pp=2``; what is not named is 1.

    Raises:
        ValueError: Anything else.
    """
    sizes = {"tp": 1, "pp": 1}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in sizes or not value.isdigit() or int(value) < 1:
            raise ValueError(f"--torchrun {text}: expected sizes such as tp=2, pp=2 or tp=2,pp=2")
        sizes[name] = int(value)
    return sizes["tp"], sizes["pp"]


@torch.no_grad()
def _hf_logits(
    template: HFModel, stored: StoredModel, hf_model: str | Path, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        write_config(exported_config(template, stored.model, torch.float32), Path(folder))
        loaded: Any = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(hf_model, config=loaded, dtype=torch.float32).eval()
    # Without a mask transformers takes a jump in the positions for the start of another sequence.
    mask = torch.ones(1, len(tokens))
    return model(input_ids=tokens[None], position_ids=positions[None], attention_mask=mask).logits[0].float()


def _run_split(checkpoint: Path, tp: int, pp: int, inputs: Path, output: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp * pp}"]
    worker = ["-m", "megatron_longpo.conversion.split_logits", str(checkpoint), str(tp), str(pp)]
    result = subprocess.run([*torchrun, *worker, str(inputs), str(output)], capture_output=True, text=True)
    if result.returncode != 0:
        raise ChildProcessError(f"the model at tp={tp},pp={pp} failed:\n{result.stderr[-4000:]}")
