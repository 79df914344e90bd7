"""Hugging Face folder → ``torch_dist`` checkpoint for any TP, PP and DP size, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from tqdm import tqdm

from megatron_longpo.config import ModelConfig, RunConfig, Window
from megatron_longpo.conversion.families import Weight
from megatron_longpo.conversion.hf_config import read_hf_folder
from megatron_longpo.conversion.hf_weights import HFWeights
from megatron_longpo.conversion.plan import planned_weights
from megatron_longpo.conversion.target import check_target, filled_folder
from megatron_longpo.conversion.torch_dist_writer import LazyTensor, write_tensors
from megatron_longpo.training.checkpoint_folder import RELEASE, RUN_FILE, TRACKER

PARAMS_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""What ``--params-dtype`` can ask for."""

_WITH_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "q_layernorm", "k_layernorm", "final_layernorm")
"""Modules whose (empty) extra state Megatron asks a checkpoint for; the norms' under Transformer Engine only."""


def convert_to_megatron(
    hf_model: str | Path,
    save: str | Path,
    *,
    params_dtype: str | None = None,
    rotary_base: float | None = None,
    max_position_embeddings: int | None = None,
    window_size: Window | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> RunConfig:
    """Write ``SAVE/release`` and the tracker file that names it.

    Weights keep their bits unless ``params_dtype`` asks for another type. The checkpoint records the model's shape as
    the trainer's flags, and the original RoPE base and window as those of the reference model.

    Args:
        hf_model: The folder to convert.
        save: Must be empty or absent, unless ``overwrite``.
        params_dtype: ``bf16``, ``fp32``, or None for that of the files.
        rotary_base, max_position_embeddings, window_size: Replace those of config.json.
        overwrite: Replace an earlier conversion.
        show_progress: Show a progress bar of bytes.

    Returns:
        The configuration recorded in the checkpoint.

    Raises:
        ValueError: Anything that would end in a wrong or incomplete checkpoint, before anything is written.
    """
    source = read_hf_folder(hf_model)
    model = dataclasses.replace(
        source.model,
        rotary_base=rotary_base or source.model.rotary_base,
        max_position_embeddings=max_position_embeddings or source.model.max_position_embeddings,
        window_size=source.model.window_size if window_size is None else window_size,
    )
    source.family.refuse_window(model)
    with HFWeights(hf_model) as files:
        weights = planned_weights(source.family, model, files)
        dtype = _stored_dtype(files, weights, params_dtype)
        config = RunConfig.from_flat_dict(
            {
                **_flags_of(model),
                "reference_rotary_base": source.model.rotary_base,
                "reference_window_size": source.model.window_size,
                "bf16": dtype == torch.bfloat16,
            }
        )
        tensors = [_lazy(weight, model, files, dtype) for weight in weights]
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        check_target(save, num_bytes, overwrite, {"--hf-model": hf_model})
        with (
            filled_folder(save, stale=[RELEASE], last=TRACKER) as folder,
            tqdm(total=num_bytes, desc="converting", unit="B", unit_scale=True, disable=not show_progress) as progress,
        ):
            release = folder / RELEASE
            release.mkdir()
            write_tensors(release, tensors, set(_state_names(weights, model.num_layers)), progress.update)
            common = {"args": Namespace(**config.to_flat_dict()), "checkpoint_version": 3.0, "iteration": 0}
            torch.save(common, release / "common.pt")
            config.dump_yaml(release / RUN_FILE)
            # Megatron takes a folder with this file for a checkpoint.
            save_config(CheckpointingConfig("torch_dist"), str(release))
            (folder / TRACKER).write_text(RELEASE)
    return config


def _flags_of(model: ModelConfig) -> dict[str, object]:
    flat = dataclasses.replace(RunConfig(), model=model).to_flat_dict()
    return {field.name: flat[field.name] for field in dataclasses.fields(ModelConfig)}


def _stored_dtype(files: HFWeights, weights: list[Weight], params_dtype: str | None) -> torch.dtype:
    if params_dtype is not None:
        return PARAMS_DTYPES[params_dtype]
    found = {files.tensors[name].dtype for weight in weights for name in weight.hf}
    if len(found) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ValueError(f"{files.folder} mixes tensors of {names}: choose with --params-dtype bf16 or fp32")
    return found.pop()


def _lazy(weight: Weight, model: ModelConfig, files: HFWeights, dtype: torch.dtype) -> LazyTensor:
    # Rows for TP 1; other sizes need other padding, which Megatron adds and cuts when it loads.
    padded_vocab = model.padded_vocab_size(1)

    def fill(out: torch.Tensor) -> None:
        files.release()  # pages of the tensors before
        weight.layout.merge_into(out, [files[name] for name in weight.hf], model)

    return LazyTensor(weight.place(model.num_layers), weight.layout.shape(model, padded_vocab), dtype, fill)


def _state_names(weights: list[Weight], num_layers: int) -> Iterator[str]:
    """Unique keys of the extra states of the modules that have these weights."""
    for weight in weights:
        place = weight.place(num_layers)
        module = place.key.rpartition(".")[0]
        if module.endswith(_WITH_STATE):
            shard = "0_1" if place.layer is None else f"{place.layer}_{num_layers}"
            yield f"{module}._extra_state/shard_{shard}"
