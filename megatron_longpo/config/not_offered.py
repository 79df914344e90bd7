"""Flags of Megatron-LM that people carry over from their scripts, and what to do instead."""

_ADVICE = {
    "all weights have one learning rate": "--decoupled-lr --decoupled-min-lr",
    "always checked; --max-skipped-steps says how many steps may be skipped": (
        "--check-for-nan-in-loss-and-grad --no-check-for-nan-in-loss-and-grad --rerun-mode"
    ),
    "always reported": (
        "--log-throughput --log-memory-to-tensorboard --log-timers-to-tensorboard --log-learning-rate-to-tensorboard"
        " --timing-log-level"
    ),
    "a resumed run always takes the schedule from its flags": (
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler"
    ),
    "attention never stores scores": "--use-flash-attn --attention-softmax-in-fp32 --no-masked-softmax-fusion",
    "checkpoints are always torch_dist": "--use-dist-ckpt --dist-ckpt-format --auto-detect-ckpt-format",
    "documents of similar length share a batch, in an order that --seed makes": "--dataloader-type",
    "fusions are chosen by device": (
        "--bias-swiglu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm"
        " --no-gradient-accumulation-fusion"
    ),
    "gradients are always reduced in fp32": (
        "--accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16 --main-grads-dtype"
    ),
    "log-probs come from the LM head, chunk by chunk: --logits-chunk-tokens": (
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl"
    ),
    "losses are means over documents, as in the paper": "--calculate-per-token-loss",
    "mixtures of experts are not supported": "--num-experts --expert-model-parallel-size --moe-grouped-gemm",
    "models are always Megatron-Core's": "--use-mcore-models --use-legacy-models",
    "no index is built, so there is nothing to cache": "--data-cache-path",
    "optimizer state is always fp32": (
        "--use-precision-aware-optimizer --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype"
    ),
    "positions, mask and targets come from the pairs": (
        "--reset-position-ids --reset-attention-mask --eod-mask-loss --no-create-attention-mask-in-dataloader"
    ),
    "Python's garbage collector runs as it always does": "--manual-gc --manual-gc-interval",
    "ranks always share the reading and writing of weights": (
        "--ckpt-fully-parallel-load --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save"
    ),
    "rows have ever new lengths, which CUDA graphs do not allow": (
        "--enable-cuda-graph --external-cuda-graph --cuda-graph-impl --cuda-graph-scope --te-rng-tracker"
    ),
    "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True": "--empty-unused-memory-level",
    "set the environment variables of NCCL": "--nccl-communicator-config-path",
    "stages hold equally many layers": (
        "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers"
        " --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
        " --pipeline-model-parallel-layout"
    ),
    "the batch size is constant": "--rampup-batch-size",
    "the dataset is always mapped into memory": "--no-mmap-bin-files",
    "the scaling of FP8 is --fp8-recipe, the rest Megatron-Core's default": (
        "--fp8-amax-history-len --fp8-amax-compute-algo --fp8-margin --fp8-interval --fp8-param-gather"
    ),
    "the supported families are plain transformers": (
        "--hybrid-override-pattern --multi-latent-attention --squared-relu --apply-layernorm-1p"
    ),
    "the supported families turn all dimensions of a head": "--rotary-percent",
    "Transformer Engine's user buffers are not set up": "--tp-comm-overlap",
    "use --bf16": "--fp16",
    "use --data-path and --split": "--train-data-path --valid-data-path --test-data-path",
    "use --log-interval": "--tensorboard-log-interval",
    "use --num-layers-per-virtual-pipeline-stage": "--num-virtual-stages-per-pipeline-rank",
    "use --position-embedding-type rope": "--use-rotary-position-embeddings",
    "use --recompute-granularity selective": "--recompute-activations",
    "use --tokenizer-model": "--vocab-file --merge-file --tiktoken-pattern",
    "use --use-distributed-optimizer": (
        "--use-megatron-fsdp --use-custom-fsdp --use-torch-fsdp2 --data-parallel-sharding-strategy"
    ),
}

NOT_OFFERED = {flag: advice for advice, flags in _ADVICE.items() for flag in flags.split()}
"""What to do instead of a flag."""
