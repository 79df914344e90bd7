"""The parameters of a model by their names in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_longpo.conversion.families import EMBEDDING, LM_HEAD
from megatron_longpo.model.build import unwrap

_LOCAL_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}


def named_parameters(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a rank's model chunks by their names in a checkpoint, layers numbered over all stages.

    The last pipeline stage's copy of a tied embedding comes as ``embedding.word_embeddings.weight`` too.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            if name.startswith("decoder.layers."):
                number, _, rest = name.removeprefix("decoder.layers.").partition(".")
                name = f"decoder.layers.{model.decoder.layers[int(number)].layer_number - 1}.{rest}"
            elif name == LM_HEAD.name and model.share_embeddings_and_output_weights:
                name = EMBEDDING.name
            for local, fused in _LOCAL_NORMS.items():
                name = name.replace(local, fused)
            yield name, parameter
