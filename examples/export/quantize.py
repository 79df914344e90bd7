"""Quantise an exported model with nvidia-modelopt, calibrated on the training pairs, for vLLM and TensorRT-LLM.

    pip install 'megatron_longpo[export]'
    python tools/convert_checkpoint.py megatron-to-hf --load RUN \\
        --hf-model TEMPLATE --save DIR
    python examples/export/quantize.py --hf-model DIR --data-path PREFIX \\
        --recipe fp8 --save DIR-fp8
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_longpo.config import ModelConfig
from megatron_longpo.conversion.hf_config import CONFIG_FILE, read_hf_model
from megatron_longpo.conversion.hf_export import copy_companions, restore_rope
from megatron_longpo.conversion.hf_weights import HFWeights
from megatron_longpo.conversion.target import check_target, filled_folder
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.document import CHOSEN
from megatron_longpo.help_format import HelpFormatter, at_least_1

RECIPES = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG", "int8": "INT8_DEFAULT_CFG"}
"""ModelOpt's configurations: fp8 for Hopper and Ada, nvfp4 for Blackwell, int8 for older GPUs."""


def calibration_rows(data_path: str, num_samples: int, max_tokens: int, vocab_size: int) -> list[torch.Tensor]:
    """Long prompts with their chosen answers, what the model was trained to continue.

    Args:
        data_path: Prefix of the training dataset.
        num_samples: Documents, drawn by a fixed seed.
        max_tokens: A longer row loses the middle of its document, so that the instruction and the answer stay.
        vocab_size: The model's.

    Returns:
        int64 ``[1, T]`` each.
    """
    dataset = PreferenceDataset(data_path, vocab_size)
    numbers = random.Random(0).sample(range(len(dataset)), min(num_samples, len(dataset)))
    rows = []
    for number in sorted(numbers):
        document = dataset[number]
        chosen = (document.joint or document.independent[0])[CHOSEN]
        tokens = torch.from_numpy(np.concatenate([document.document_tokens, chosen.tokens])).long()
        if len(tokens) > max_tokens:
            head = max_tokens // 2
            tokens = torch.cat([tokens[:head], tokens[head - max_tokens :]])
        rows.append(tokens[None])
    return rows


def quantize(model: Any, recipe: str, rows: Sequence[torch.Tensor]) -> Any:
    """Insert quantisers and set their scales from the activations of the calibration rows."""
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]

    def calibrate(calibrated: Any) -> None:
        with torch.no_grad():
            for row in tqdm(rows, desc="calibrating", unit="document"):
                calibrated(row.to(calibrated.device))

    return mtq.quantize(model, copy.deepcopy(getattr(mtq, RECIPES[recipe])), calibrate)


def export(model: Any, trained: ModelConfig, template: str | Path, save: str | Path) -> None:
    """Write the quantised folder, with the RoPE, the tokenizer and the chat template of the unquantised one."""
    from modelopt.torch.export import export_hf_checkpoint  # type: ignore[import-not-found]

    with filled_folder(save, stale=["*.safetensors", "*.safetensors.index.json"], last=CONFIG_FILE) as folder:
        with torch.inference_mode():
            export_hf_checkpoint(model, dtype=model.dtype, export_dir=folder)
        restore_rope(folder, trained)
        copy_companions(template, folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and quantise; mistakes of the user end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--hf-model", required=True, metavar="DIR", help="what megatron-to-hf wrote")
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="training pairs to calibrate on")
    parser.add_argument("--recipe", choices=RECIPES, default="fp8", help="format of the weights; nvfp4 needs a GPU")
    parser.add_argument("--save", required=True, metavar="DIR", help="quantised folder to write")
    parser.add_argument(
        "--save-state", metavar="FILE", help="also keep ModelOpt's state and weights, to go on training"
    )
    parser.add_argument("--num-samples", type=at_least_1, default=256, metavar="N", help="documents to calibrate on")
    parser.add_argument("--max-tokens", type=at_least_1, default=8192, metavar="TOKENS", help="tokens of one document")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --save")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"quantize.py: error: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Quantise as the command line asks."""
    import modelopt.torch.opt as mto  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    if arguments.recipe == "nvfp4" and not torch.cuda.is_available():
        raise ValueError("--recipe nvfp4 needs a GPU: ModelOpt computes its block scales there")
    trained = read_hf_model(arguments.hf_model)
    with HFWeights(arguments.hf_model) as files:
        num_bytes = sum(tensor.num_bytes for tensor in files.tensors.values())
    check_target(arguments.save, num_bytes, arguments.overwrite, {"--hf-model": arguments.hf_model})
    model = AutoModelForCausalLM.from_pretrained(
        arguments.hf_model, dtype="auto", device_map="auto" if torch.cuda.is_available() else None
    ).eval()
    rows = calibration_rows(arguments.data_path, arguments.num_samples, arguments.max_tokens, model.config.vocab_size)
    model = quantize(model, arguments.recipe, rows)
    if arguments.save_state:
        mto.save(model, arguments.save_state)
    export(model, trained, arguments.hf_model, arguments.save)
    print(f"wrote {arguments.save}: vllm serve {arguments.save}, or trtllm-serve {arguments.save}")


if __name__ == "__main__":
    main()
