"""The command line of ``tools/convert_checkpoint.py``.

What does the work is imported when it is needed: ``--help`` and wrong flags do not wait for torch and Megatron.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_longpo.help_format import HelpFormatter, window_size
from megatron_longpo.processes import no_interrupt_lost

if TYPE_CHECKING:
    from megatron_longpo.conversion.verify import LogitsRow, TensorRow

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three commands; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        with no_interrupt_lost():
            return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted", file=sys.stderr)
        return 130


def parse_size(text: str) -> int:
    """Bytes from ``5GB`` (10^9) or ``5GiB`` (2^30), as transformers reads them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 5GB or 500MB")
    return int(float(match[1]) * unit)


def _positive(kind: type, above: float) -> Any:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = above
        if not above < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number greater than {above:g}")
        return value

    return convert


def parser() -> argparse.ArgumentParser:
    """The three commands and their flags."""
    top = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Convert between Hugging Face and Megatron's torch_dist checkpoints, one tensor at a time.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, formatter_class=HelpFormatter, allow_abbrev=False)

    command = add_command("hf-to-megatron", "write a checkpoint that loads at any TP, PP and DP size")
    command.add_argument("--hf-model", required=True, metavar="DIR", help="Hugging Face folder to convert")
    _add_save(command)
    command.add_argument("--params-dtype", choices=("bf16", "fp32"), help="type of the weights (default: as stored)")
    command.add_argument(
        "--rotary-base", type=_positive(float, 1), metavar="X", help="RoPE base to record instead of the model's"
    )
    command.add_argument(
        "--max-position-embeddings",
        type=_positive(int, 0),
        metavar="TOKENS",
        help="longest sequence to record instead of the model's",
    )
    command.add_argument(
        "--window-size",
        type=window_size,
        metavar="LEFT,0",
        help="sliding window to record instead of the model's; full: none",
    )
    command.set_defaults(run=_hf_to_megatron)

    command = add_command("megatron-to-hf", "write a folder that transformers and vLLM open")
    command.add_argument("--load", required=True, metavar="DIR", help="checkpoint, or folder of checkpoints")
    command.add_argument(
        "--hf-model", required=True, metavar="DIR", help="template: architecture, tokenizer, chat template, generation"
    )
    _add_save(command)
    command.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="limit of one file")
    command.add_argument(
        "--iteration", type=_positive(int, -1), metavar="N", help="training step (default: the newest)"
    )
    command.set_defaults(run=_megatron_to_hf)

    command = add_command("verify", "compare every tensor, and logits, of the two; exit code 1 if they differ")
    command.add_argument("--hf-model", required=True, metavar="DIR", help="Hugging Face folder")
    command.add_argument("--megatron", required=True, metavar="DIR", help="checkpoint, or folder of checkpoints")
    command.add_argument(
        "--torchrun",
        nargs="*",
        default=["tp=1"],
        metavar="SIZES",
        help="parallel sizes to compute logits at: tp=1 pp=2 tp=2,pp=2 … (default: tp=1); without any: tensors only",
    )
    command.add_argument(
        "--max-logit-difference", type=_positive(float, 0), metavar="X", help="tolerance in fp32 (default: 1e-4)"
    )
    command.set_defaults(run=_verify)
    return top


def _add_save(command: argparse.ArgumentParser) -> None:
    command.add_argument("--save", required=True, metavar="DIR", help="folder to write; empty or absent")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in --save")


def _hf_to_megatron(arguments: argparse.Namespace) -> int:
    from megatron_longpo.conversion.to_megatron import convert_to_megatron

    config = convert_to_megatron(
        arguments.hf_model,
        arguments.save,
        params_dtype=arguments.params_dtype,
        rotary_base=arguments.rotary_base,
        max_position_embeddings=arguments.max_position_embeddings,
        window_size=arguments.window_size,
        overwrite=arguments.overwrite,
    )
    print(f"wrote {arguments.save}; the model's flags, which --use-checkpoint-args reads from it:")
    print(" ".join(config.model_flags()))
    return 0


def _megatron_to_hf(arguments: argparse.Namespace) -> int:
    from megatron_longpo.conversion.hf_export import has_tokenizer
    from megatron_longpo.conversion.to_hf import convert_to_hf

    checkpoint = convert_to_hf(
        arguments.load,
        arguments.hf_model,
        arguments.save,
        max_shard_bytes=arguments.max_shard_size,
        iteration=arguments.iteration,
        overwrite=arguments.overwrite,
    )
    print(f"wrote {arguments.save} from {checkpoint}")
    if not has_tokenizer(arguments.save):
        print(
            f"{arguments.save} has no tokenizer, as --hf-model {arguments.hf_model} has none: copy tokenizer*, vocab*, "
            "merges.txt and chat_template* there from the folder that was --tokenizer-model in preprocessing"
        )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_longpo.conversion.verify import compare_logits, compare_tensors, refuse_impossible_sizes

    if arguments.max_logit_difference is not None and not arguments.torchrun:
        raise ValueError(
            f"--max-logit-difference {arguments.max_logit_difference:g} has no effect where --torchrun has no sizes: "
            "leave it out"
        )
    tolerance = arguments.max_logit_difference or 1e-4
    refuse_impossible_sizes(arguments.hf_model, arguments.torchrun)
    rows = compare_tensors(arguments.hf_model, arguments.megatron)
    print(tensor_table(rows))
    equal = not any(row.num_differing for row in rows)
    logits = []
    for row in compare_logits(arguments.hf_model, arguments.megatron, arguments.torchrun) if arguments.torchrun else ():
        logits.append(row)
        equal = equal and row.largest <= tolerance
    if logits:
        print("\n" + logits_table(logits, tolerance))
    print("\nequal" if equal else "\nDIFFERENT")
    return 0 if equal else 1


def tensor_table(rows: Sequence[TensorRow]) -> str:
    """The comparison of tensors as text."""
    lines = [("tensor", "count", "type", "differ", "max |Δ|")]
    lines += [(r.name, str(r.num_tensors), r.dtypes, str(r.num_differing), f"{r.largest:.3g}") for r in rows]
    total = sum(r.num_tensors for r in rows), sum(r.num_differing for r in rows)
    lines.append(("all", str(total[0]), "", str(total[1]), f"{max(r.largest for r in rows):.3g}"))
    return _table(lines)


def logits_table(rows: Sequence[LogitsRow], tolerance: float) -> str:
    """The comparison of logits as text."""
    lines = [("logits in fp32", "tokens", "max |Δ|", "tolerance", "max |logit|", "same argmax")]
    for row in rows:
        numbers = (f"{row.largest:.3g}", f"{tolerance:g}", f"{row.largest_logit:.3g}", f"{row.same_argmax:.1%}")
        lines.append((row.sizes, str(row.num_tokens), *numbers))
    return _table(lines)


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
