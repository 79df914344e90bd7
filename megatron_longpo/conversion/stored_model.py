"""A model in a checkpoint, tensor by tensor under its Hugging Face names."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_longpo.conversion.families import Family, Weight
from megatron_longpo.conversion.hf_weights import DTYPES, listed
from megatron_longpo.conversion.torch_dist_reader import TensorReader
from megatron_longpo.training.checkpoint_folder import find_checkpoint, is_checkpoint, iteration_folder, saved_config

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


class StoredModel:
    """Opens a checkpoint and checks that it holds exactly the tensors of its model.

    Args:
        folder: A folder of checkpoints, or one checkpoint.
        family: The map to Hugging Face's names.
        iteration: Training step, or None for the newest.

    Raises:
        ValueError: No such checkpoint, or it is incomplete or of another kind of model.
    """

    def __init__(self, folder: str | Path, family: Family, iteration: int | None = None) -> None:
        self.checkpoint = _checkpoint(Path(folder), iteration)
        self.model = saved_config(self.checkpoint).model
        self.weights = list(family.weights(self.model))
        self._reader = TensorReader(self.checkpoint)
        self._refuse_misfits(family)
        self.dtype = self._dtype()

    def read(self, weight: Weight) -> tuple[torch.Tensor, ...]:
        """The Hugging Face tensors of one parameter."""
        # Vocabulary padding depends on the TP size that the checkpoint was written at; only true rows are read.
        shape = weight.layout.shape(self.model, self.model.vocab_size)
        whole = self._reader.read(weight.place(self.model.num_layers), shape)
        return weight.layout.split(whole.to(self.dtype), self.model)

    def _refuse_misfits(self, family: Family) -> None:
        errors = []
        expected: dict[str, tuple[int, ...]] = {}
        for weight in self.weights:
            place = weight.place(self.model.num_layers)
            expected[place.key] = place.stored_shape(weight.layout.shape(self.model, self.model.vocab_size))
        found = {key: tensor for key, tensor in self._reader.tensors.items() if key.startswith(_MODEL_KEYS)}
        missing, unknown = [key for key in expected if key not in found], [key for key in found if key not in expected]
        if missing:
            errors.append(f"{family.architecture} has parameters that are missing: {listed(missing)}")
        if unknown:
            errors.append(f"{family.architecture} has no place for the parameters: {listed(unknown)}")
        if missing or unknown:
            errors.append("give as --hf-model a folder of the checkpoint's own kind of model")
        if wrong := [
            f"{key} is {list(found[key].size)}, not {list(shape)}"
            for key, shape in expected.items()
            if key in found and not _fits(tuple(found[key].size), tuple(shape))
        ]:
            errors.append(f"shapes disagree with the recorded flags: {listed(wrong)}")
        if files := self._reader.missing_files():
            errors.append(f"files are missing or truncated: {listed(files)}")
        if errors:
            raise ValueError(f"{self.checkpoint}: " + "; ".join(errors))

    def _dtype(self) -> torch.dtype:
        found = {
            self._reader.tensors[weight.place(self.model.num_layers).key].properties.dtype for weight in self.weights
        }
        if len(found) > 1 or not found <= set(DTYPES.values()):
            raise ValueError(
                f"{self.checkpoint} has parameters of {listed(sorted(map(str, found)))}; expected one of float32, "
                "bfloat16 or float16 for all"
            )
        return found.pop()


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal, or a two-dimensional embedding whose vocabulary is padded."""
    if len(found) == len(expected) == 2:
        return found[0] >= expected[0] and found[1] == expected[1]
    return found == expected


def _checkpoint(folder: Path, iteration: int | None) -> Path:
    if iteration is not None:
        chosen = iteration_folder(folder, iteration)
        if not is_checkpoint(chosen):
            steps = sorted(int(path.name[5:]) for path in folder.glob("iter_*") if path.name[5:].isdigit())
            raise ValueError(f"--iteration {iteration}: {chosen} is no checkpoint; there are {steps or 'none'}")
        return chosen
    found = find_checkpoint(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds no checkpoint: it has no latest_checkpointed_iteration.txt; give the folder that a run's "
            "or hf-to-megatron's --save wrote"
        )
    return found
