"""Both conversions without a progress bar, and what they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_longpo.conversion.to_hf import convert_to_hf
from megatron_longpo.conversion.to_megatron import convert_to_megatron


def to_megatron(hf_model: Path, save: Path, **options: Any) -> Any:
    return convert_to_megatron(hf_model, save, show_progress=False, **options)


def to_hf(load: Path, hf_model: Path, save: Path, **options: Any) -> Path:
    return convert_to_hf(load, hf_model, save, show_progress=False, **options)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def for_both_generations(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 wrote, with the RoPE that transformers 4 reads beside it, as in an export."""
    scaling = dict(config["rope_parameters"])
    older: dict[str, Any] = {"rope_theta": scaling.pop("rope_theta")}
    if scaling["rope_type"] != "default":
        older["rope_scaling"] = scaling
    return config | older
