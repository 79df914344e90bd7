"""What making pairs costs besides the model: the pipeline's own overhead, and what one prefill for n turns saves.

Overhead: the pipeline runs against a real HTTP server in a process of its own, which answers every request after a
fixed time and counts the requests in flight. If all slots were filled all the time, nothing would be lost; what is
missing is overhead: of the pipeline, of HTTP on both sides, and of filling and draining at both ends of the run.

Shared prefill: the embedded engine answers n instructions about one document, once together and once one by one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.circumstances import circumstances
from benchmarks.generation.chat_server import MODEL
from benchmarks.generation.documents import train_tokenizer, write_documents
from megatron_longpo.files import write_json
from megatron_longpo.generation.logs import log_to
from megatron_longpo.generation.output import prepare_output
from megatron_longpo.generation.runner import run_task
from megatron_longpo.generation.settings import GenerationSettings
from megatron_longpo.generation.shared_prefill import Sampling, generate
from megatron_longpo.help_format import HelpFormatter, at_least_1, number_above_0

_VOCAB = 4096


@dataclass(frozen=True)
class OverheadCase:
    """A run of the pipeline: documents, requests in flight, time of an answer."""

    num_documents: int = 1500
    document_chars: int = 6000
    concurrency: int = 64
    latency_ms: float = 50.0
    num_workers: int = 1


@dataclass(frozen=True)
class PrefillCase:
    """A document and the instructions about it, and the shape of a random model."""

    document_tokens: int = 4096
    num_turns: int = 4
    answer_tokens: int = 32
    num_layers: int = 4
    hidden_size: int = 256
    rounds: int = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run both and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    for flag, default, metavar, what in (
        ("--num-documents", OverheadCase.num_documents, "N", "overhead: documents"),
        ("--concurrency", OverheadCase.concurrency, "N", "overhead: requests in flight"),
        ("--document-tokens", PrefillCase.document_tokens, "TOKENS", "shared prefill: length of the document"),
    ):
        add(flag, type=at_least_1, default=default, metavar=metavar, help=what)
    add(
        "--latency-ms",
        type=number_above_0,
        default=OverheadCase.latency_ms,
        metavar="MS",
        help="overhead: time of an answer",
    )
    add("--results", metavar="DIR", help="also write generation.json there")
    flags = parser.parse_args(argv)
    torch.set_num_threads(1)
    overhead_case = OverheadCase(flags.num_documents, concurrency=flags.concurrency, latency_ms=flags.latency_ms)
    prefill_case = PrefillCase(flags.document_tokens)
    result = {
        "overhead": asdict(overhead_case) | overhead(overhead_case),
        "shared_prefill": asdict(prefill_case) | shared_prefill(prefill_case),
        **circumstances(("datatrove", "aiohttp", "torch", "transformers")),
    }
    print(_table(result))
    if flags.results:
        write_json(Path(flags.results, "generation.json"), result)


def overhead(case: OverheadCase) -> dict[str, Any]:
    """The pipeline's time beyond that of the answers."""
    with tempfile.TemporaryDirectory() as name, _server(case.latency_ms) as url:
        folder = Path(name)
        print(f"{case.num_documents} documents against {url}", file=sys.stderr, flush=True)
        write_documents(folder / "documents.jsonl", case.num_documents, case.document_chars)
        train_tokenizer(folder / "tokenizer", _VOCAB)
        settings = GenerationSettings(
            documents=(str(folder / "documents.jsonl"),),
            output=str(folder / "pairs"),
            engine="openai",
            model=MODEL,
            base_url=url,
            tokenizer_model=str(folder / "tokenizer"),
            concurrency=case.concurrency,
            num_workers=case.num_workers,
            min_document_tokens=500,
            target_length=10_000,
            min_chunk_tokens=150,
            max_chunk_tokens=300,
        )
        prepare_output(settings)
        log_to(folder / "log")
        run_task(settings)
        with urllib.request.urlopen(url.removesuffix("/v1") + "/occupation") as response:
            occupation = json.load(response)
    mean = occupation["mean"]
    return {
        "num_requests": occupation["answered"],
        "mean_in_flight": mean,
        "overhead": 1 - mean / case.concurrency,
    }


@contextmanager
def _server(latency_ms: float) -> Any:
    command = [sys.executable, "-m", "benchmarks.generation.chat_server", "--latency-ms", str(latency_ms)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def shared_prefill(case: PrefillCase) -> dict[str, Any]:
    """Time of n answers about one document, each by itself, over that of all together; the median of rounds."""
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=_VOCAB,
            hidden_size=case.hidden_size,
            intermediate_size=3 * case.hidden_size,
            num_hidden_layers=case.num_layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=1 << 20,
            sliding_window=None,
        )
    ).eval()
    document = torch.randint(0, _VOCAB, (case.document_tokens,)).tolist()
    prompts = [[*document, *torch.randint(0, _VOCAB, (16,)).tolist()] for _ in range(case.num_turns)]

    def answer(rows: list[list[int]]) -> tuple[float, list[list[int]]]:
        started = time.perf_counter()
        greedy = [Sampling(0.0, 1.0, 0)] * len(rows)
        limits = [case.answer_tokens] * len(rows)
        replies = generate(model, rows, greedy, limits, frozenset(), batch_size=4, prefill_tokens=2048)
        return time.perf_counter() - started, replies

    answer(prompts[:1])
    ratios = []
    for _ in tqdm(range(case.rounds), desc="shared prefill", unit="round"):
        together, ours = answer(prompts)
        alone = [answer([prompt]) for prompt in prompts]
        if ours != [reply for _, (reply,) in alone]:
            raise RuntimeError("answers with a shared prefill differ from those without")
        ratios.append(sum(seconds for seconds, _ in alone) / together)
    return {"times_faster": sorted(ratios)[len(ratios) // 2]}


def _table(result: dict[str, Any]) -> str:
    one, two = result["overhead"], result["shared_prefill"]
    return "\n".join(
        (
            f"{one['num_requests']:,} requests of {one['latency_ms']:g} ms: {one['mean_in_flight']:.1f} of "
            f"{one['concurrency']} in flight on average, {one['overhead']:.1%} of the time lost (target: under 5 %)",
            f"{two['num_turns']} turns of one document of {two['document_tokens']:,} tokens: one prefill for all makes "
            f"them {two['times_faster']:.2f}x as fast",
            json.dumps({key: result[key] for key in ("date", "machine", "versions", "commit")}),
        )
    )
