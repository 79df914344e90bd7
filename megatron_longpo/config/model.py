"""Shape of the model: Llama, Mistral, Qwen2/2.5 (QKV bias) and Qwen3 (QK-norm)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.field import Window, absent, equals, flag, given

_FROM_CHECKPOINT = "that of the checkpoint; else required"
_ROPE = equals("position_embedding_type", "rope")
_LLAMA3 = (_ROPE, given("use_rope_scaling"))
_YARN = equals("position_embedding_type", "yarn")
_NO_DROPOUT = "the shared-prefix row has no dropout"


@dataclass(frozen=True)
class ModelConfig:
    """Shape and RoPE; --load-hf and --use-checkpoint-args give all of it.

    A size of 0 is not given: `__post_init__` derives ``ffn_hidden_size``, ``kv_channels`` and ``num_query_groups`` as
    Megatron-LM does; the other sizes come from a checkpoint or the tokenizer (`RunConfig.with_model`).
    """

    num_layers: int = flag(0, "transformer layers", unit="layers", at_least=1, default_text=_FROM_CHECKPOINT)
    hidden_size: int = flag(0, "width of the residual stream", at_least=1, default_text=_FROM_CHECKPOINT)
    ffn_hidden_size: int = flag(
        0, "inner width of the MLP", at_least=1, default_text="8/3 * hidden-size, down to a multiple of 64"
    )
    num_attention_heads: int = flag(0, "query heads", unit="heads", at_least=1, default_text=_FROM_CHECKPOINT)
    kv_channels: int = flag(0, "dimension of one head", at_least=1, default_text="hidden-size / num-attention-heads")
    group_query_attention: bool = flag(False, "several query heads share one key/value head")
    num_query_groups: int = flag(
        0,
        "key/value heads",
        unit="heads",
        at_least=1,
        needs=given("group_query_attention"),
        default_text="1; num-attention-heads without --group-query-attention",
    )
    max_position_embeddings: int = flag(
        131072,
        "longest sequence the model is made for",
        unit="tokens",
        at_least=1,
        default_text="that of the checkpoint; else 131072",
        changeable=True,
    )
    position_embedding_type: str = flag(
        "rope",
        "rotary embedding, plain (or with --use-rope-scaling) or with YaRN frequencies",
        choices=("rope", "yarn"),
        changeable=True,
    )
    rotary_base: float = flag(
        10000.0,
        "RoPE base to train with; the paper raises it to 1e7 for 128K",
        above=1,
        source="LongPO",
        default_text="that of the checkpoint; else 10000",
        changeable=True,
    )
    use_rope_scaling: bool = flag(
        False,
        "Llama 3.1 frequency scaling",
        needs=_ROPE,
        changeable=True,
    )
    rope_scaling_factor: float = flag(
        8.0, "divides the low frequencies", above=0, needs=_LLAMA3, source="Llama 3.1", changeable=True
    )
    rope_low_freq_factor: float = flag(
        1.0,
        "below this many turns a frequency is divided",
        above=0,
        needs=_LLAMA3,
        unit="turns",
        source="Llama 3.1",
        changeable=True,
    )
    rope_high_freq_factor: float = flag(
        4.0,
        "above this many turns a frequency is kept",
        above=0,
        needs=_LLAMA3,
        unit="turns",
        source="Llama 3.1",
        changeable=True,
    )
    rope_original_max_position_embeddings: int = flag(
        8192, "length before scaling", unit="tokens", at_least=1, needs=_LLAMA3, source="Llama 3.1", changeable=True
    )
    yarn_rotary_scaling_factor: float = flag(
        40.0, "how many times longer than the original length", at_least=1, needs=_YARN, source="YaRN", changeable=True
    )
    yarn_original_max_position_embeddings: int = flag(
        4096, "length before scaling", unit="tokens", at_least=1, needs=_YARN, source="YaRN", changeable=True
    )
    yarn_beta_fast: float = flag(
        32.0,
        "above this many turns a frequency is kept",
        above=0,
        needs=_YARN,
        unit="turns",
        source="YaRN",
        changeable=True,
    )
    yarn_beta_slow: float = flag(
        1.0,
        "below this many turns a frequency is divided",
        above=0,
        needs=_YARN,
        unit="turns",
        source="YaRN",
        changeable=True,
    )
    yarn_mscale: float | None = flag(
        None,
        "attention temperature: numerator's scale",
        above=0,  # transformers takes 0 for absent, so no config.json could say it
        needs=(_YARN, given("yarn_mscale_all_dim")),
        default_text="1",
        source="YaRN",
        changeable=True,
    )
    yarn_mscale_all_dim: float | None = flag(
        None,
        "attention temperature: denominator's scale",
        above=0,  # transformers takes 0 for absent, so no config.json could say it
        needs=(_YARN, given("yarn_mscale")),
        default_text="0",
        source="YaRN",
        changeable=True,
    )
    yarn_correction_range_round_to_int: bool = flag(
        True,
        "keep fractions of the ramp's first and last dimension",
        needs=_YARN,
        default_text="rounded",
        source="YaRN",
        changeable=True,
    )
    window_size: Window = flag(
        Window(),
        "sliding window: tokens before a token that it sees, and 0 after it; full is none. Hugging Face's "
        "sliding_window 4096 is 4095,0 (Mistral 7B v0.1)",
        unit="left,0",
        default_text="that of the checkpoint; else full",
        changeable=True,
    )
    normalization: str = flag(
        "RMSNorm", "norm of every layer", choices=("RMSNorm",), why="the supported families have no other"
    )
    norm_epsilon: float = flag(1e-5, "added to the mean square in the norm", above=0)
    swiglu: bool = flag(False, "gated SiLU in the MLP; required, the supported families have it")
    disable_bias_linear: bool = flag(False, "no bias in linear layers; required, the supported families have none")
    add_qkv_bias: bool = flag(False, "bias in the query, key and value projection (Qwen2)")
    qk_layernorm: bool = flag(False, "RMSNorm on each query and key head (Qwen3)")
    untie_embeddings_and_output_weights: bool = flag(False, "the LM head has weights of its own")
    vocab_size: int = flag(0, "entries of the vocabulary", unit="tokens", at_least=1, default_text="the tokenizer's")
    make_vocab_size_divisible_by: int = flag(
        128, "pad the embedding's rows to a multiple of this times TP", unit="rows", at_least=1, changeable=True
    )
    init_method_std: float = flag(
        0.02,
        "standard deviation of random initial weights",
        above=0,
        needs=absent("load_hf", "pretrained_checkpoint"),
        changeable=True,
    )
    attention_dropout: float = flag(0.0, "must be 0", choices=(0.0,), why=_NO_DROPOUT, changeable=True)
    hidden_dropout: float = flag(0.0, "must be 0", choices=(0.0,), why=_NO_DROPOUT, changeable=True)

    def __post_init__(self) -> None:
        derived = {
            "ffn_hidden_size": self.hidden_size * 8 // 3 // 64 * 64,
            "kv_channels": self.hidden_size // self.num_attention_heads if self.num_attention_heads > 0 else 0,
            "num_query_groups": 1 if self.group_query_attention else self.num_attention_heads,
        }
        for name, value in derived.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)

    @property
    def query_width(self) -> int:
        """Width of a token's queries, all heads."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of a token's keys, all heads; that of its values too."""
        return self.num_query_groups * self.kv_channels

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of the embedding over all TP ranks: the vocabulary, padded as Megatron-LM pads it."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple
