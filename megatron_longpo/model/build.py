"""From a run's configuration to the model chunks of this rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.model.gpt import SharedPrefixGPT
from megatron_longpo.model.recompute import make_frugal
from megatron_longpo.model.rope import attention_factor, rotate
from megatron_longpo.model.specs import block_spec


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Megatron's transformer configuration for a run.

    No dropout and no fused kernels that only some shapes have. ``calculate_per_token_loss`` makes the schedules sum
    gradients and divide once by the count that the loss function returns, here documents: the average over a global
    batch is then exact for every layout.
    """
    model, parallel, training = config.model, config.parallel, config.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    factor = attention_factor(model)
    interleaved = config.num_virtual_stages is not None
    rope_utils.fused_apply_rotary_pos_emb = rotate  # where Megatron's attention looks for a fused kernel
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.kv_channels,
        num_query_groups=model.num_query_groups,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # takes the module that the spec names, here `SwiGLU`
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        # YaRN scales queries and keys alike, so the scores by the square.
        softmax_scale=None if factor == 1.0 else factor**2 / model.kv_channels**0.5,
        window_size=None if model.window_size.num_tokens is None else tuple(model.window_size),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.bf16,
        use_cpu_initialization=not platform.has_cuda(),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.num_virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required beside variable lengths, experts or not
        calculate_per_token_loss=True,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        recompute_modules=list(training.recompute_modules) if training.recompute_modules else None,
        fp8=training.fp8_format,
        fp8_recipe=training.fp8_recipe,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # Between two ranks, batched transfers of the interleaved schedule cross, since neither gloo nor NCCL matches
        # messages by more than their order: shapes of rows of unequal lengths get mixed up (NVIDIA/Megatron-LM#5271).
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
    )


def build_model(config: RunConfig) -> list[torch.nn.Module]:
    """The model chunks of this rank, on its device, in the training dtype (one chunk unless interleaved).

    Needs Megatron's parallel state. Weights are random; a checkpoint replaces them.
    """
    settings = transformer_config(config)
    virtual_stages = config.num_virtual_stages
    chunks: list[torch.nn.Module] = []
    with platform.construction():
        for stage in range(virtual_stages or 1):
            vp_stage = stage if virtual_stages else None
            chunk = SharedPrefixGPT(
                settings,
                block_spec(
                    config.model,
                    config.training.transformer_impl,
                    get_num_layers_to_build(settings, vp_stage=vp_stage),
                    config.training.attention_backend,
                    mlp_chunk_tokens=config.training.mlp_chunk_tokens,
                    projection_chunk_tokens=config.training.projection_chunk_tokens,
                ),
                config.model,
                config.model.padded_vocab_size(settings.tensor_model_parallel_size),
                config.training.logits_chunk_tokens,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
            training = config.training
            # Megatron's own loop fails if groups of layers do not divide a stage, and is the one that knows fp8.
            recomputes = training.recompute_granularity == "full" and training.fp8_format is None
            if recomputes or training.cpu_offloading_num_layers:
                make_frugal(chunk.decoder, training.recompute_keep_attention, training.cpu_offloading_num_layers)
            chunk.to(platform.device())
            chunks.append(Float16Module(settings, chunk) if config.training.bf16 else chunk)
    return chunks


def wrap_for_training(config: RunConfig, chunks: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Put Megatron's data parallelism around every chunk: gradient buffers in fp32, reduced over DP x CP."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    with platform.construction():
        return [
            # As in Megatron-LM: only the first chunk's buckets can overlap, later ones finish at the flush.
            DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]


def unwrap(chunk: Any) -> SharedPrefixGPT:
    """The bare model inside its data-parallel and bf16 wrappers."""
    while not isinstance(chunk, SharedPrefixGPT):
        chunk = chunk.module
    return chunk
