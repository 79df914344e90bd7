"""Published training speeds, and what the time model says of the same runs: the tables of docs/performance.md.

    python -m megatron_longpo.planning.published

No rate is fitted to these results. Where a publication leaves something open, what was assumed stands beside its row.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import RunConfig
from megatron_longpo.config.training import FUSED
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.help_format import HelpFormatter
from megatron_longpo.model.flops import attended_pairs, layer_weights, step_flops
from megatron_longpo.planning.hardware import GPU, GPUS, H100
from megatron_longpo.planning.links import all_gather_s
from megatron_longpo.planning.step_time import StepTime, step_time
from megatron_longpo.planning.tables import table
from megatron_longpo.planning.workload import Work

MISTRAL_7B = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --vocab-size 32000 --untie-embeddings-and-output-weights"
)
LLAMA2_7B = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --vocab-size 32000 "
    "--untie-embeddings-and-output-weights"
)
ALL_LAYERS = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

LONGPO = ((131_072, 8, 4401), (262_144, 16, 4120), (524_288, 16, 2744))
"""Tokens, A800s, tokens/s of all GPUs (arXiv 2502.13922)."""

CHUNK_TOKENS = 16_384
"""Of the short prompts of the reference model, half of their limit."""

NEMO = (
    (16, 16, 2, 1, 660),
    (32, 32, 2, 2, 610),
    (64, 64, 4, 2, 574),
    (128, 128, 4, 4, 555),
    (256, 256, 4, 8, 549),
    (512, 512, 8, 16, 549),
    (1024, 1024, 8, 32, 536),
)
"""Thousands of tokens, H100s, TP, CP, TFLOP/s per GPU of Llama 2 7B in FP8 (NeMo, performance_long_sequence.md)."""

NEMO_B200 = (
    (8, 2, 1, 1, 1671),
    (16, 4, 1, 1, 1717),
    (32, 8, 1, 2, 1624),
    (64, 16, 1, 4, 1600),
    (128, 32, 2, 4, 1588),
    (256, 64, 4, 4, 1590),
    (512, 128, 4, 8, 1619),
    (1024, 256, 4, 16, 1608),
)
"""The same of Llama 3 8B on B200s (the page in NeMo 25.04). Its number of GPUs is four times the product of its TP, CP
and DP; the product is taken."""

NEMO_TOKENS_PER_BATCH = 4 * 2**20
"""In both tables."""

FP8_MATMUL_TFLOPS = {"h100-80gb": 1402.6, "b200-192gb": 3432.5}
"""The source is that of ``matmul_tflops``."""

LLAMA3_405B = (
    "--hidden-size 16384 --ffn-hidden-size 53248 --num-attention-heads 128 --group-query-attention "
    "--num-query-groups 8 --vocab-size 128256 --untie-embeddings-and-output-weights"
)
LLAMA3_8B = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --vocab-size 128256 --untie-embeddings-and-output-weights"
)
LLAMA3_LAYERS = 126

LLAMA3 = ((8_192, 1, 64, 32, 430), (8_192, 1, 128, 16, 400), (131_072, 16, 8, 16, 380))
"""Tokens, CP, DP, rows per DP rank, BF16 TFLOP/s per GPU, all with TP 8 and PP 16 (arXiv 2407.21783, Table 4)."""

TITAN_8B = ((32_768, 1, 3890), (65_536, 2, 2540), (131_072, 4, 1071), (262_144, 8, 548))
"""Tokens, CP, tokens/s per GPU of Llama 3.1 8B on 8 H100s in FP8 (torchtitan, llama3_h100_202412, Table 2)."""

TITAN_405B = ((32_768, 1, 76), (65_536, 2, 47), (131_072, 4, 31), (262_144, 8, 16))
"""The same of Llama 3.1 405B on 512 H100s, with TP 8 and PP 8 (Table 6)."""

TITAN_MEM_GBS, TITAN_ROWS = 2400, 8
"""Memory bandwidth of those H100s, and rows of each 405B data-parallel rank in a step."""


@dataclass(frozen=True)
class Comparison:
    """One published number and the model's."""

    run: str
    published: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over published; 1 is right."""
        return self.predicted / self.published


def longpo_paper() -> list[Comparison]:
    """The authors' trainer: both conversations in full, checkpointing, reference in every step, Ulysses, ZeRO-3.

    Sequences are split over the 8 GPUs of a node; 16 GPUs are two such groups. ZeRO-3 gathers the weights for forward,
    recomputation and backward. Tokens are those of the document, once per pair.
    """
    gpu = GPUS["a800-80gb"]
    comparisons = []
    for tokens, num_gpus, published in LONGPO:
        config = _config(f"{MISTRAL_7B} {ALL_LAYERS} --context-parallel-size 8 --cp-comm-type a2a", tokens, 8)
        pair = RowLayout((DocumentLayout(tokens, ()), DocumentLayout(tokens, ())), 8)
        step = step_time(config, num_gpus, Work(pair, 2 * (tokens - 1)), gpu)
        short = RowLayout((DocumentLayout(CHUNK_TOKENS, ()),) * 2, 8)
        reference = step_time(config, num_gpus, Work(short, 2), gpu).parts
        # A forward pass is a third of the matrix products and 1 of 3.5 of attention's.
        reference_s = reference["matrix products"] / 3 + reference["attention"] / 3.5
        weights = 2 * config.model.num_layers * layer_weights(config.model)
        gathered_s = 3 * config.num_microbatches(num_gpus) * all_gather_s(gpu, weights, num_gpus, stride=1)
        seconds = step.seconds + reference_s + gathered_s
        name = f"{tokens // 1024}K, {num_gpus} A800"
        comparisons.append(Comparison(name, published, step.documents * tokens / seconds))
    return comparisons


def nemo_long_sequences(attention_tflops: tuple[float, float]) -> list[Comparison]:
    """Llama 2 7B in FP8 with context parallelism on H100s, TFLOP/s per GPU.

    Which attention kernel the container of March 2024 used is not said, so it is an argument.
    """
    return _nemo(LLAMA2_7B, NEMO, H100, attention_tflops)


def nemo_on_b200() -> list[Comparison]:
    """Llama 3 8B in FP8 with context parallelism on B200s, TFLOP/s per GPU, with cuDNN's attention."""
    gpu = GPUS["b200-192gb"]
    return _nemo(LLAMA3_8B, NEMO_B200, gpu, gpu.attention_rates(FUSED))


def _nemo(
    model: str, runs: tuple[tuple[int, ...], ...], gpu: GPU, attention_tflops: tuple[float, float]
) -> list[Comparison]:
    """NeMo counts attention without the causal half here (``flops_formulas.py`` of the first table's release).

    Its ring of keys and values is taken as hidden behind attention. Matrix products run at FP8's measured rate.
    """
    rated = gpu.with_rates(FP8_MATMUL_TFLOPS[gpu.name], list(attention_tflops))
    name = gpu.name.split("-")[0].upper()
    comparisons = []
    for kilo, num_gpus, tp, cp, published in runs:
        tokens = kilo * 1024
        words = f"{model} --tensor-model-parallel-size {tp} --context-parallel-size {cp} --use-distributed-optimizer"
        words += " --sequence-parallel" if tp > 1 else ""
        config = _config(words, tokens, NEMO_TOKENS_PER_BATCH // tokens)
        layout = RowLayout((DocumentLayout(tokens, ()),), cp, cp * tp)
        step = step_time(config, num_gpus, Work(layout, tokens - 1), rated)
        step = dataclasses.replace(step, parts=step.parts | {"context parallel": 0.0})
        comparisons.append(
            Comparison(f"{kilo}K, {num_gpus} {name}", published, _non_causal_tflops(config, layout, step))
        )
    return comparisons


def llama3_pretraining(attention_tflops: tuple[float, float]) -> list[Comparison]:
    """Meta's pre-training of Llama 3 405B, TFLOP/s per GPU.

    The first and the last of the 128 model chunks have no layer, so there are 8 of one layer on each of the 16 stages,
    and a stage takes as long as if all were filled. Keys and values are gathered, optimizer and gradients sharded.
    """
    gpu = dataclasses.replace(H100, attention_tflops=attention_tflops)
    comparisons = []
    for tokens, cp, dp, rows, published in LLAMA3:
        num_gpus = 8 * cp * 16 * dp
        layout = f"--tensor-model-parallel-size 8 --sequence-parallel --context-parallel-size {cp}"
        words = f"{LLAMA3_405B} {layout} --pipeline-model-parallel-size 16 --num-layers-per-virtual-pipeline-stage 1"
        chunks = _config(f"{words} --num-layers 128 --use-distributed-optimizer", tokens, rows * dp)
        work = Work(RowLayout((DocumentLayout(tokens, ()),), cp, cp * 8), tokens - 1)
        step = step_time(chunks, num_gpus, work, gpu, gathers_in_chunks=False)
        model = dataclasses.replace(chunks.model, num_layers=LLAMA3_LAYERS)
        step = dataclasses.replace(step, flops=step.documents * step_flops(model, work.layout, work.num_predictions))
        comparisons.append(Comparison(f"{tokens // 1024}K, {num_gpus:,} H100", published, step.tflops_per_gpu))
    return comparisons


def torchtitan(attention_tflops: tuple[float, float]) -> list[Comparison]:
    """torchtitan's Llama 3.1 8B and 405B in FP8, every layer recomputed, tokens/s per GPU.

    Of its H100s the memory bandwidth is published; they run at 500 W in place of 700, and what that takes from the
    other rates is not known, so it is not modelled. Sharded weights are gathered in forward and backward of every row.
    """
    gpu = dataclasses.replace(
        H100, matmul_tflops=FP8_MATMUL_TFLOPS[H100.name], attention_tflops=attention_tflops, mem_gbs=TITAN_MEM_GBS
    )
    runs = [("8B", LLAMA3_8B, 8, 1, 1, run) for run in TITAN_8B]
    # 126 layers on 8 stages: the fullest has 16.
    runs += [("405B", f"{LLAMA3_405B} --num-layers 128", 8 * 64, 8, 8, run) for run in TITAN_405B]
    comparisons = []
    for name, model, num_gpus, tp, pp, (tokens, cp, published) in runs:
        words = f"{model} {ALL_LAYERS} --context-parallel-size {cp} --use-distributed-optimizer"
        words += f" --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
        words += " --sequence-parallel" if tp > 1 else ""
        dp = num_gpus // tp // pp // cp
        config = _config(words, tokens, dp * (TITAN_ROWS if pp > 1 else 1))
        work = Work(RowLayout((DocumentLayout(tokens, ()),), cp, cp * tp), tokens - 1)
        step = step_time(config, num_gpus, work, gpu, gathers_in_chunks=False)
        weights = 2 * config.model.num_layers / pp * layer_weights(config.model) / tp
        gathered_s = 2 * config.num_microbatches(num_gpus) * all_gather_s(gpu, weights, dp * cp, stride=tp)
        rate = step.tokens / (step.seconds + gathered_s) / num_gpus
        comparisons.append(Comparison(f"{name}, {tokens // 1024}K, {num_gpus} H100", published, rate))
    return comparisons


def _non_causal_tflops(config: RunConfig, layout: RowLayout, step: StepTime) -> float:
    model = config.model
    per_pair = 3 * 4.0 * model.num_layers * model.query_width
    skipped = layout.num_tokens**2 - attended_pairs(layout)
    flops = step.flops + step.documents * per_pair * skipped
    return flops / step.seconds / step.num_gpus / 1e12


def _config(words: str, tokens: int, documents: int) -> RunConfig:
    shared = "--swiglu --disable-bias-linear --bf16 --attention-backend flash"
    shared += f" --seq-length {tokens} --max-position-embeddings {tokens}"
    return parse_arguments(f"{words} {shared} --global-batch-size {documents}".split())


def comparison_table(comparisons: list[Comparison], unit: str) -> str:
    """Publication beside prediction."""
    lines = [[c.run, f"{c.published:,.0f}", f"{c.predicted:,.0f}", f"{c.ratio:.2f}"] for c in comparisons]
    return table(["run", f"published {unit}", f"predicted {unit}", "ratio"], lines)


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(
        prog="python -m megatron_longpo.planning.published", description=__doc__, formatter_class=HelpFormatter
    ).parse_args()
    print(comparison_table(longpo_paper(), "tokens/s"))
    for kernel, rates in (("FlashAttention 2", H100.attention_tflops), ("cuDNN", H100.attention_rates(FUSED))):
        print(f"\n\nAttention at the rates of {kernel}: {rates[0]:.0f} forward, {rates[1]:.0f} backward")
        print("\nNeMo, Llama 2 7B")
        print(comparison_table(nemo_long_sequences(rates), "TFLOP/s/GPU"))
        print("\nLlama 3 405B")
        print(comparison_table(llama3_pretraining(rates), "TFLOP/s/GPU"))
        print("\ntorchtitan")
        print(comparison_table(torchtitan(rates), "tokens/s/GPU"))
    print("\n\nNeMo, Llama 3 8B on B200, attention at the rates of cuDNN")
    print(comparison_table(nemo_on_b200(), "TFLOP/s/GPU"))


if __name__ == "__main__":
    main()
