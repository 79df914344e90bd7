"""Seconds of one optimizer step: work over rate, part by part.

    step = m · t · (1 + (p − 1) / (v · m)) + data parallel + optimizer,    t = Σ over the parts of one micro-batch

with m micro-batches, p pipeline stages of v virtual ones each: the bubble of interleaved 1F1B (Narayanan et al. 2021,
arXiv 2104.04473, section 2.2). t is that of the last stage, which has the LM head and sets the pace. Nothing is assumed
to overlap but what the code overlaps by itself: transfers between interleaved stages, keys and values of a ring or of
chunks of heads behind attention, transfers to the host behind computation.
`docs/performance.md` gives every formula with its source.
"""

# T=tokens of a row t=tokens of a rank H=hidden_size F=ffn V=vocabulary N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config import RunConfig
from megatron_longpo.model.flops import attention_flops, forward_flops, layer_weights, step_flops
from megatron_longpo.planning.exchange_time import attention_s, context_parallel_s
from megatron_longpo.planning.hardware import GPU, MEASURED_LINK_SHARE
from megatron_longpo.planning.links import all_gather_s, all_reduce_s, neighbour_s
from megatron_longpo.planning.recomputation import Repeated, repeated
from megatron_longpo.planning.saved import element_bytes, kept_bytes, offloaded_share
from megatron_longpo.planning.workload import Work

HEAD_PRODUCTS = 4
"""Matrix products of the LM head: logits forward, again in backward, and the two gradients."""

HEAD_PASSES = 4.5
"""Passes over the fp32 logits besides what products read (`objective/logprobs.py`): written by a product and read,
forward and backward, and then half a pass for the error in half precision."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Args:
        parts: Seconds by part; they add up to the step.
        documents: Documents of the step.
        tokens: Tokens of the step, those of a shared prefix once.
        flops: Model FLOPs of the step: forward and backward, nothing computed again.
        num_gpus: Ranks.
        peak_tflops: Of each, dense bf16.
    """

    parts: dict[str, float]
    documents: int
    tokens: int
    flops: float
    num_gpus: int
    peak_tflops: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    @property
    def seconds_per_document(self) -> float:
        """Seconds of the whole step per document."""
        return self.seconds / self.documents

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens per second and GPU, those of a shared prefix once."""
        return self.tokens / self.seconds / self.num_gpus

    @property
    def tflops_per_gpu(self) -> float:
        """Model TFLOP/s per GPU."""
        return self.flops / self.seconds / self.num_gpus / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPUs could do at their peak, 0 to 1."""
        return self.tflops_per_gpu / self.peak_tflops

    def gpu_hours(self, num_documents: int) -> float:
        """Of a run over this many documents, without its reference pass and its checkpoints."""
        return self.seconds_per_document * num_documents * self.num_gpus / 3600


def step_time(config: RunConfig, num_gpus: int, work: Work, gpu: GPU, gathers_in_chunks: bool = True) -> StepTime:
    """Predict one optimizer step of a validated run.

    ``gathers_in_chunks`` is whether ``--cp-comm-type all_gather`` works a chunk of heads at a time and, in backward,
    ahead of the layer, as it does here and not everywhere.
    """
    gpu = gpu.of_run(num_gpus)
    parallel, training = config.parallel, config.training
    stages = parallel.pipeline_model_parallel_size
    micro_batches = config.num_microbatches(num_gpus)
    again = repeated(config)
    compute = _compute(config, work, gpu, again)
    one = {
        **compute,
        "element-wise": _element_wise_s(config, work, gpu, again),
        "tensor parallel": _tensor_parallel_s(config, work, gpu, again),
        "context parallel": context_parallel_s(config, work, gpu, again, gathers_in_chunks),
        "host transfers": _host_transfers_s(config, work, gpu, compute),
        "pipeline transfers": _pipeline_s(config, num_gpus, work, gpu),
    }
    parts = {name: micro_batches * seconds for name, seconds in one.items()}
    parts["pipeline bubble"] = (stages - 1) / (config.num_virtual_stages or 1) * sum(one.values())
    parts |= _once_per_step(config, num_gpus, gpu)
    documents = training.global_batch_size
    rows = documents // training.micro_batch_size
    return StepTime(
        parts,
        documents,
        rows * work.layout.num_tokens,
        rows * step_flops(config.model, work.layout, work.num_predictions),
        num_gpus,
        gpu.peak_tflops,
    )


def parameters_of_rank(config: RunConfig) -> float:
    """Weights that a rank of the last stage holds."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    vocabulary = model.padded_vocab_size(tp) * model.hidden_size
    tied_or_first = config.parallel.pipeline_model_parallel_size == 1 and model.untie_embeddings_and_output_weights
    layers = model.num_layers / config.parallel.pipeline_model_parallel_size
    return (layers * layer_weights(model) + vocabulary * (2 if tied_or_first else 1)) / tp


def _compute(config: RunConfig, work: Work, gpu: GPU, again: Repeated) -> dict[str, float]:
    model, parallel = config.model, config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    stages = parallel.pipeline_model_parallel_size
    whole = forward_flops(model, work.layout, 0)
    forward_s, backward_s = attention_s(config, work, gpu)
    head = forward_flops(model, work.layout, work.num_predictions) - whole
    matmul_s = (whole - attention_flops(model, work.layout)) / ranks / stages / (gpu.matmul_tflops * 1e12)
    local_predictions = work.num_predictions / parallel.context_parallel_size
    local_vocabulary = model.padded_vocab_size(parallel.tensor_model_parallel_size) / (
        parallel.tensor_model_parallel_size
    )
    # Every chunk's weight gradient is written, read, and added to an fp32 sum.
    chunks = local_predictions / config.training.logits_chunk_tokens
    head_bytes = 4 * HEAD_PASSES * local_predictions * local_vocabulary
    head_bytes += chunks * 16 * local_vocabulary * model.hidden_size
    return {
        "matrix products": 3 * matmul_s,
        "attention": forward_s + backward_s,
        "LM head": HEAD_PRODUCTS * head / ranks / (gpu.matmul_tflops * 1e12) + head_bytes / (gpu.mem_gbs * 1e9),
        "recomputation": again.matmul * matmul_s + again.attention * forward_s,
    }


def _element_wise_s(config: RunConfig, work: Work, gpu: GPU, again: Repeated) -> float:
    """Norms, residuals, RoPE, SwiGLU and copies between kernels: bytes over memory bandwidth.

    Values read and written per token and layer, counted from the operators: two norms 4H, two residuals 6H, heads laid
    out for attention and back 2(N+2G)D + 2ND; backward twice that. RoPE 2(N+G)D each way. SwiGLU 3F, backward 5F. And
    what backward makes again, the outputs of norms and gate, 4H + 3F. Then the weight gradients of the micro-batch: 12
    bytes each, from bf16 into the fp32 buffer.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    query, key = model.query_width, model.kv_width
    hidden = model.hidden_size / (tp if parallel.sequence_parallel else 1)
    laid_out = 10 * hidden + (2 * (query + 2 * key) + 2 * query) / tp
    rotated = 2 * (query + key) / tp
    forward = laid_out + rotated + 3 * model.ffn_hidden_size / tp
    backward = 2 * laid_out + rotated + 5 * model.ffn_hidden_size / tp
    remade = 4 * hidden + 3 * model.ffn_hidden_size / tp
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    tokens = work.layout.padded_tokens / parallel.context_parallel_size
    values = (1 + again.matmul) * forward + backward + remade
    num_bytes = element_bytes(config) * values * tokens * layers
    return (num_bytes + 12 * parameters_of_rank(config)) / (gpu.mem_gbs * 1e9)


def _tensor_parallel_s(config: RunConfig, work: Work, gpu: GPU, again: Repeated) -> float:
    """Two all-reduces of ``[t, H]`` per layer and direction (Megatron-LM, arXiv 1909.08053, section 3).

    With sequence parallel each is an all-gather and a reduce-scatter, the same bytes (arXiv 2205.05198, section 4.2.2).
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    tokens = work.layout.padded_tokens / parallel.context_parallel_size
    num_bytes = element_bytes(config) * tokens * model.hidden_size
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    # The embedding and the LM head need about one more in each direction; what the LM head exchanges again under
    # sequence parallel is behind its matrix products.
    return (layers * (4 + again.all_reduces) + 2) * all_reduce_s(gpu, num_bytes, tp, stride=1)


def _host_transfers_s(config: RunConfig, work: Work, gpu: GPU, compute: dict[str, float]) -> float:
    """Offloaded activations to the host and back: what is longer than the computation that hides it, each way.

    The host's memory takes both ways together. Where the backward pass follows at once, the last layer's tensors are
    still on the device; between interleaved stages one layer's come back behind nothing.
    """
    layers = offloaded_share(config) * config.model.num_layers / config.parallel.pipeline_model_parallel_size
    if not layers:
        return 0.0
    rate = gpu.host_link_gbs * 1e9 * MEASURED_LINK_SHARE
    one_layer = kept_bytes(config, work) / rate
    one_way = layers * one_layer
    forward = compute["matrix products"] / 3 + attention_s(config, work, gpu)[0]
    backward = compute["matrix products"] + compute["attention"] + compute["recomputation"] - forward
    in_memory = 2 * one_way * gpu.host_link_gbs / gpu.host_mem_gbs
    waiting = max(max(0.0, one_way - forward) + max(0.0, one_way - backward), in_memory - forward - backward)
    return waiting + (one_layer if config.num_virtual_stages else 0.0)


def _pipeline_s(config: RunConfig, num_gpus: int, work: Work, gpu: GPU) -> float:
    """Hidden states to the next stage and their gradients back; interleaved schedules send while they compute."""
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_model_parallel_size
    if stages == 1 or parallel.num_layers_per_virtual_pipeline_stage is not None:
        return 0.0
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    tokens = work.layout.padded_tokens / parallel.context_parallel_size
    num_bytes = element_bytes(config) * tokens * model.hidden_size / split
    return 2 * neighbour_s(gpu, num_bytes, stride=num_gpus // stages, group_size=stages)


def _once_per_step(config: RunConfig, num_gpus: int, gpu: GPU) -> dict[str, float]:
    """Gradients summed in fp32 over DP and CP ranks, Adam, weights gathered (ZeRO, arXiv 1910.02054)."""
    parallel = config.parallel
    parameters = parameters_of_rank(config)
    ranks = parallel.context_parallel_size * parallel.data_parallel_size(num_gpus)
    tp = parallel.tensor_model_parallel_size
    if parallel.use_distributed_optimizer:
        data_s = all_gather_s(gpu, (4 + element_bytes(config)) * parameters, ranks, stride=tp)
        updated = parameters / ranks
    else:
        data_s = all_reduce_s(gpu, 4 * parameters, ranks, stride=tp)
        updated = parameters
    # Gradients are zeroed; of those that are updated here, the norm is taken and they are scaled to it.
    optimizer_s = (4 * parameters + 12 * updated) / (gpu.mem_gbs * 1e9)
    # Adam reads gradient, weight and moments and writes all but the first. Weights in bf16 are cast from fp32.
    cast = 4 + element_bytes(config) if config.training.bf16 else 0
    if config.optimizer.optimizer_cpu_offload:
        # On the host, with fp32 gradients on their way there, and updated weights cast on their way back.
        optimizer_s += (28 + cast) * updated / (gpu.host_mem_gbs * 1e9 * MEASURED_LINK_SHARE)
        optimizer_s += (4 + element_bytes(config)) * updated / (gpu.host_link_gbs * 1e9 * MEASURED_LINK_SHARE)
    else:
        optimizer_s += (28 + cast) * updated / (gpu.mem_gbs * 1e9)
    return {"data parallel": data_s, "optimizer": optimizer_s}
