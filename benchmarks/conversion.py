"""Speed and peak memory of conversion, against transformers loading and saving the same files.

Every step runs in a process of its own on a randomly initialised checkpoint, none of which is in memory at the start.
Time is that of the work without imports, until the files are on the disk (fsync), and the smallest of some rounds; peak
memory is the greatest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.circumstances import circumstances
from megatron_longpo.config import ModelConfig
from megatron_longpo.conversion.families import FAMILIES
from megatron_longpo.conversion.hf_config import CONFIG_FILE
from megatron_longpo.conversion.hf_weights import HFWeights
from megatron_longpo.conversion.safetensors_file import ShardedWriter, TensorSpec
from megatron_longpo.help_format import HelpFormatter, at_least_1, number_above_0

_FAMILY = FAMILIES["MistralForCausalLM"]
_SHARD_BYTES = 5 * 10**9
_STEPS = {
    "hf-to-megatron": "from megatron_longpo.conversion.to_megatron import convert_to_megatron as work; "
    "arguments = dict(hf_model='{hf}', save='{megatron}', show_progress=False)",
    "megatron-to-hf": "from megatron_longpo.conversion.to_hf import convert_to_hf as work; "
    "arguments = dict(load='{megatron}', hf_model='{hf}', save='{back}', show_progress=False)",
    "transformers from_pretrained + save_pretrained": "work = lambda: (MistralForCausalLM.from_pretrained("
    "'{hf}', dtype='auto').save_pretrained('{theirs}', max_shard_size='5GB'), "
    "[sync_file(path) for path in Path('{theirs}').iterdir()]); arguments = dict()",
}
_IMPORTS = (
    "import time; from pathlib import Path; from megatron_longpo.files import sync_file; "
    "from transformers import MistralConfig, MistralForCausalLM; "
)
_TIMED = "; start = time.perf_counter(); work(**arguments); print('seconds', time.perf_counter() - start)"


@dataclass(frozen=True)
class StepResult:
    """One measured process."""

    step: str
    seconds: float
    gb_per_s: float
    peak_rss_gb: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line asks; returns the exit code: 1 where memory or bits are not as promised."""
    parser = argparse.ArgumentParser(
        description="Convert a random checkpoint there and back; compare speed and peak memory with transformers'.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gigabytes", type=number_above_0, default=8.0, metavar="GB", help="least size of the checkpoint"
    )
    parser.add_argument(
        "--rounds", type=at_least_1, default=2, metavar="N", help="measurements of every step; the fastest counts"
    )
    parser.add_argument("--folder", metavar="DIR", help="scratch space, four times the size (default: a temporary one)")
    parser.add_argument("--results", metavar="DIR", help="write the result, with machine and versions, to this folder")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark-conversion-") as folder:
        result = run(Path(folder), int(arguments.gigabytes * 1e9), arguments.rounds)
    print(_table(result))
    if arguments.results:
        path = Path(arguments.results, "conversion.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        around = circumstances(("torch", "megatron-core", "transformers", "safetensors"))
        path.write_text(json.dumps(result | around, indent=2) + "\n")
        print(f"wrote {path}")
    if arguments.json:
        print(json.dumps(result))
    return 0 if result["bit_identical"] and result["within_bound"] else 1


def run(folder: Path, num_bytes: int, num_rounds: int) -> dict[str, Any]:
    """Make the checkpoint and measure every step.

    Args:
        folder: Empty; holds up to four copies.
        num_bytes: Size of the checkpoint, at least that of one layer and the embeddings.
        num_rounds: How often every step is measured, one after another.
    """
    places = {name: str(folder / name) for name in ("hf", "megatron", "back", "theirs")}
    specs = write_random_checkpoint(Path(places["hf"]), num_bytes)
    size = sum(spec.num_bytes for spec in specs)
    rounds: list[list[StepResult]] = []
    identical = True
    for _ in range(num_rounds):
        rounds.append([_measure(name, code.format(**places), size, folder) for name, code in _STEPS.items()])
        identical = identical and _identical(places["hf"], places["back"])
        for name in ("megatron", "back", "theirs"):
            shutil.rmtree(places[name])
    # A disturbance of the machine only ever adds time.
    steps = [min(results, key=lambda result: result.seconds) for results in zip(*rounds, strict=True)]
    largest = max(spec.num_bytes for spec in specs)
    bound = 3 * largest + 2 * 10**9
    ours, theirs = steps[:2], steps[2]
    return {
        "checkpoint_gb": size / 1e9,
        "rounds": num_rounds,
        "largest_tensor_gb": largest / 1e9,
        "bound_gb": bound / 1e9,
        "within_bound": all(step.peak_rss_gb * 1e9 <= bound for step in ours),
        "bit_identical": identical,
        "steps": [asdict(step) for step in steps],
        "speed_vs_transformers": {step.step: theirs.seconds / step.seconds for step in ours},
        "memory_vs_transformers": {step.step: step.peak_rss_gb / theirs.peak_rss_gb for step in ours},
    }


def write_random_checkpoint(folder: Path, num_bytes: int) -> list[TensorSpec]:
    """A bf16 checkpoint of Mistral 7B's shape with as many layers as it takes to be of this size or larger."""
    layer_bytes, other_bytes = 436_224_000, 524_296_192
    num_layers = max(1, -(-(num_bytes - other_bytes) // layer_bytes))
    model = ModelConfig(
        num_layers=num_layers,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        group_query_attention=True,
        num_query_groups=8,
        untie_embeddings_and_output_weights=True,
        vocab_size=32000,
    )
    specs = [
        TensorSpec(name, shape, torch.bfloat16)
        for weight in _FAMILY.weights(model)
        for name, shape in zip(weight.hf, weight.layout.hf_shapes(model), strict=True)
    ]
    folder.mkdir(parents=True)
    # Other numbers in every tensor, without drawing billions of them.
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    total = sum(spec.num_bytes for spec in specs)
    with (
        ShardedWriter(folder, specs, _SHARD_BYTES) as writer,
        tqdm(total=total, desc="random checkpoint", unit="B", unit_scale=True) as progress,
    ):
        for number, spec in enumerate(specs):
            count = torch.Size(spec.shape).numel()
            rows = noise.roll(7919 * number).repeat(-(-count // noise.numel()))[:count]
            writer.write(spec.name, rows.view(spec.shape))
            progress.update(spec.num_bytes)
    config = {
        "architectures": [_FAMILY.architecture],
        "model_type": "mistral",
        "num_hidden_layers": num_layers,
        "sliding_window": None,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return specs


def _measure(name: str, code: str, size: int, folder: Path) -> StepResult:
    print(name, file=sys.stderr, flush=True)
    _forget(folder)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _IMPORTS + code + _TIMED], stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"{name} failed with exit code {os.waitstatus_to_exitcode(status)}")
    seconds = float(text.split("seconds")[-1])
    return StepResult(name, seconds, size / 1e9 / seconds, usage.ru_maxrss * 1024 / 1e9)


def _forget(folder: Path) -> None:
    """Drop the files' pages from memory: which ones are still there depends on the steps before."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _identical(one: str, other: str) -> bool:
    with HFWeights(one) as ours, HFWeights(other) as theirs:
        if {n: (t.dtype, t.shape) for n, t in ours.tensors.items()} != {
            n: (t.dtype, t.shape) for n, t in theirs.tensors.items()
        }:
            return False
        for name in tqdm(ours.tensors, desc="comparing", unit="tensor"):
            if not ours[name][:].view(torch.int16).equal(theirs[name][:].view(torch.int16)):
                return False
            ours.release()
            theirs.release()
    return True


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'step':48}  {'seconds':>8}  {'GB/s':>6}  {'peak RSS, GB':>12}"]
    lines += [
        f"{step['step']:48}  {step['seconds']:8.1f}  {step['gb_per_s']:6.2f}  {step['peak_rss_gb']:12.2f}"
        for step in result["steps"]
    ]
    lines.append(
        f"checkpoint {result['checkpoint_gb']:.2f} GB, largest tensor {result['largest_tensor_gb']:.2f} GB, bound "
        f"{result['bound_gb']:.2f} GB ({'kept' if result['within_bound'] else 'BROKEN'}); there and back "
        f"{'bit-identical' if result['bit_identical'] else 'DIFFERENT'}"
    )
    return "\n".join(lines)
