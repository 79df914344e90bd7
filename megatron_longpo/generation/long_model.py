"""A second folder of a model, for a server: the same weights, and a config.json with room for whole documents.

    models/mistral-7b/        config.json  model-00001-of-00002.safetensors  tokenizer.json …
    models/mistral-7b-long/   config.json' -> links to the rest

Every server reads a model's length and RoPE base from config.json. What its command line offers instead depends on the
server and its version, and may do nothing: since RoPE's parameters moved into one dictionary (vllm-project/vllm#28542),
vLLM reads ``--hf-overrides '{"rope_theta": 1e7}'`` and goes on with the model's base.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_longpo.files import write_json
from megatron_longpo.help_format import HelpFormatter, at_least_1, number_above_0
from megatron_longpo.processes import plain_ending

_KINDS = ("default", "linear", "llama3", "yarn")
_MISTRALS_OWN = ("params.json", "consolidated*")
"""Weights and configuration in Mistral's form: vLLM prefers them to config.json."""

_DESCRIPTION = """\
Make a folder of a model for a server that reads whole documents: links to its files, and a config.json with more
positions and, if you like, another RoPE base.

  python tools/lengthen_model.py --hf-model models/mistral-7b \\
      --save models/mistral-7b-long --max-position-embeddings 135168
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(
        "lengthen_model.py", description=_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-model", required=True, metavar="DIR", help="folder of the model")
    parser.add_argument("--save", required=True, metavar="DIR", help="folder to make; empty or absent")
    parser.add_argument(
        "--max-position-embeddings",
        required=True,
        type=at_least_1,
        metavar="TOKENS",
        help="positions that the model must have at least: document, instruction and answer",
    )
    parser.add_argument("--rotary-base", type=number_above_0, metavar="BASE", help="RoPE base (default: the model's)")
    arguments = parser.parse_args(argv)
    with plain_ending("lengthen_model.py"):
        write_long_model(arguments.hf_model, arguments.save, arguments.max_position_embeddings, arguments.rotary_base)
        print(f"wrote {arguments.save}")


def write_long_model(model: str | Path, save: str | Path, num_positions: int, rotary_base: float | None = None) -> None:
    """Make the second folder of a model.

    Args:
        model: The first one.
        save: The second one.
        num_positions: ``max_position_embeddings``, where the model has fewer.
        rotary_base: RoPE base; None keeps the model's.

    Raises:
        ValueError: There is no config.json of a known form, or ``save`` is not empty.
    """
    model, save = Path(model), Path(save)
    file = model / "config.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--hf-model {model} is no folder of a Hugging Face model: config.json: {error}") from error
    try:
        config = long_config(stored, num_positions, rotary_base)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; copy the folder, and change its config.json by hand") from error
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise ValueError(f"--save {save} is not an empty folder: give another, or delete it")
    files = [path for path in sorted(model.iterdir()) if path.name != file.name]
    save.mkdir(parents=True, exist_ok=True)
    for path in files:
        if not any(fnmatch(path.name, pattern) for pattern in _MISTRALS_OWN):
            (save / path.name).symlink_to(path.resolve())
    write_json(save / file.name, config)


def long_config(config: dict[str, Any], num_positions: int, rotary_base: float | None = None) -> dict[str, Any]:
    """A config.json, as transformers 4 or 5 writes it, with more positions and another RoPE base, all else kept.

    Raises:
        ValueError: It keeps them where this function does not look.
    """
    config = copy.deepcopy(config)
    length = config.get("max_position_embeddings")
    if not isinstance(length, int):
        raise ValueError("it has no max_position_embeddings, or has it in a part of its own")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("its layers differ in RoPE's parameters")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _KINDS:
        raise ValueError(f"RoPE of the kind {kind!r} is not known here, only {', '.join(_KINDS)}")
    if num_positions > length:
        config["max_position_embeddings"] = num_positions
        # What transformers derives from the model's length must not follow it.
        if kind in ("llama3", "yarn") and rope.get("original_max_position_embeddings") is None:
            rope["original_max_position_embeddings"] = length
        if kind == "yarn" and rope.get("factor") is None:
            rope["factor"] = length / rope["original_max_position_embeddings"]
    if rotary_base is not None:
        places = [place for place in (config, rope) if "rope_theta" in place]
        # Without one, transformers 5 looks into the dictionary and transformers 4 at the top.
        for place in places or [rope if "rope_parameters" in config and rope else config]:
            place["rope_theta"] = rotary_base
    return config
