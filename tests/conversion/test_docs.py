"""Every command of docs/checkpoints.md and of the export example is one that the programs understand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.convert_checkpoint import parser

ROOT = Path(__file__).parents[2]
PAGES = ["docs/checkpoints.md", "examples/export/README.md"]


def commands(page: str) -> list[list[str]]:
    """The indented command lines of a page, continuation lines joined."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in lines if re.match(r"(python|torchrun) ", line)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    seen = 0
    for words in commands(page):
        seen += 1
        if "pretrain_longpo.py" in words:
            config = parse_arguments(words[words.index("pretrain_longpo.py") + 1 :])
            nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
            num_gpus = nodes * int(words[words.index("--nproc-per-node") + 1])
            assert num_gpus % config.parallel.model_parallel_size == 0
        elif words[1] == "tools/convert_checkpoint.py":
            parser().parse_args(words[2:])
        else:
            assert words[1] == "examples/export/quantize.py"
    assert seen > 2
