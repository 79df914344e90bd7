"""``torch_dist`` checkpoint → Hugging Face folder, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from megatron_longpo.conversion.hf_config import CONFIG_FILE, read_hf_folder
from megatron_longpo.conversion.hf_export import (
    companions_bytes,
    copy_companions,
    exported_config,
    refuse_other_template,
    write_config,
)
from megatron_longpo.conversion.safetensors_file import ShardedWriter, TensorSpec
from megatron_longpo.conversion.stored_model import StoredModel
from megatron_longpo.conversion.target import check_target, filled_folder

_OLD_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def convert_to_hf(
    load: str | Path,
    hf_model: str | Path,
    save: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    iteration: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Path:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and vLLM open.

    Args:
        load: A folder of checkpoints, or one checkpoint, written at any parallel sizes.
        hf_model: Template: gives architecture, tokenizer, chat template and generation settings.
        save: Must be empty or absent, unless ``overwrite``.
        max_shard_bytes: Limit of one file of weights.
        iteration: Training step to convert; None is the newest.
        overwrite: Replace the weights, and every file that the template gives, in ``save``.
        show_progress: Show a progress bar of bytes.

    Returns:
        The checkpoint that was converted.

    Raises:
        ValueError: Anything that would end in a wrong or incomplete folder, before anything is written.
    """
    template = read_hf_folder(hf_model)
    stored = StoredModel(load, template.family, iteration)
    refuse_other_template(template, stored.model, hf_model, stored.checkpoint)
    config = exported_config(template, stored.model, stored.dtype)
    specs = [
        TensorSpec(name, shape, stored.dtype)
        for weight in stored.weights
        for name, shape in zip(weight.hf, weight.layout.hf_shapes(stored.model), strict=True)
    ]
    num_bytes = sum(spec.num_bytes for spec in specs)
    check_target(save, num_bytes + companions_bytes(hf_model), overwrite, {"--hf-model": hf_model, "--load": load})
    with (
        filled_folder(save, stale=_OLD_WEIGHTS, last=CONFIG_FILE) as folder,
        tqdm(total=num_bytes, desc="converting", unit="B", unit_scale=True, disable=not show_progress) as progress,
    ):
        with ShardedWriter(folder, specs, max_shard_bytes) as writer:
            for weight in stored.weights:
                for name, tensor in zip(weight.hf, stored.read(weight), strict=True):
                    writer.write(name, tensor)
                    progress.update(tensor.nbytes)
        copy_companions(hf_model, folder)
        write_config(config, folder)
    return stored.checkpoint
