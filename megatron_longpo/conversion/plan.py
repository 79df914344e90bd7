"""Checking, before anything is read or written, that a folder's tensors are exactly those that a model needs."""

from __future__ import annotations

from megatron_longpo.config import ModelConfig
from megatron_longpo.conversion.families import NOT_WEIGHTS, Family, Weight
from megatron_longpo.conversion.hf_weights import HFWeights, listed

_TIED_COPY = "lm_head.weight"


def planned_weights(family: Family, model: ModelConfig, files: HFWeights) -> list[Weight]:
    """The parameters of a model, once every tensor of the folder is known to have its place among them.

    Args:
        family: The map.
        model: Shape of the model.
        files: The folder's tensors.

    Raises:
        ValueError: Tensors that are missing, that the map does not know, or whose shape is not the configuration's;
            all of them are named.
    """
    weights = list(family.weights(model))
    expected = {
        name: shape for weight in weights for name, shape in zip(weight.hf, weight.layout.hf_shapes(model), strict=True)
    }
    found = files.tensors
    errors = []
    if missing := [name for name in expected if name not in found]:
        errors.append(f"tensors are missing: {listed(missing)}")
    ignored = {name for name in found if name.endswith(NOT_WEIGHTS)}
    if not model.untie_embeddings_and_output_weights:
        # Some tools save a tied LM head a second time; `refuse_other_head` looks into it.
        ignored.add(_TIED_COPY)
    if unmapped := [name for name in found if name not in expected and name not in ignored]:
        errors.append(f"{family.architecture} has no place for the tensors: {listed(unmapped)}")
    if wrong := [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]:
        errors.append(f"shapes disagree with config.json: {listed(wrong)}")
    if errors:
        raise ValueError(f"{files.folder}: " + "; ".join(errors))
    if not model.untie_embeddings_and_output_weights:
        _refuse_other_head(model, files)
    return weights


def _refuse_other_head(model: ModelConfig, files: HFWeights) -> None:
    """A tied model's copy of the embedding must be a copy: else the folder holds another model than its config says."""
    if _TIED_COPY not in files.tensors:
        return
    head, embedding, rows = files[_TIED_COPY], files["model.embed_tokens.weight"], 4096
    for start in range(0, model.vocab_size, rows):
        if not head[start : start + rows].equal(embedding[start : start + rows]):
            raise ValueError(
                f"{files.folder}: config.json says tie_word_embeddings, but {_TIED_COPY} differs from "
                "model.embed_tokens.weight; set tie_word_embeddings to false"
            )
