"""The dry runs of docs/memory.md, made again by the command that the page gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import RunConfig
from megatron_longpo.planning.dry_run_command import predicted, print_dry_run, resolved
from megatron_longpo.planning.hardware import gpu_named

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
KEPT = f"{FULL} --recompute-keep-attention"
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


Row = tuple[list[str], str, str, str, str]


def rows() -> list[Row]:
    """The command with a row's flags, the row's flags as they stand there, GiB of device and host, and seconds."""
    commands = re.findall(r"pretrain_longpo.py --load-hf models/mistral-7b (.*?--gpu h100-80gb)\n", PAGE, re.DOTALL)
    tables = PAGE.split("| flags | peak, GiB | host, GiB | predicted s per step |")[1:]
    found: list[Row] = []
    for command, table in zip(commands, tables, strict=True):
        row = r"^\| (.*?) \| ([\d.]+) \| ([\d.]+|–) \| ([\d.]+) \|$"
        for flags, *numbers in re.findall(row, table.partition("\n\n")[0], re.MULTILINE):
            words = flags.replace("(none)", "").replace("`full`", FULL).replace("`kept`", KEPT).replace("`", "")
            found.append(([*command.replace("\\\n", " ").split(), *words.split()], flags, *numbers))
    return found


def config_of(row: Row, folder: Path) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B))
    return parse_arguments(["--load-hf", str(folder), *row[0]])


def test_every_flag_that_saves_memory_has_a_row() -> None:
    flags = " ".join(row[1] for row in rows())
    for flag in (
        "keep-attention",
        "mlp-chunk",
        "projection-chunk",
        "cpu-offloading-num-layers",
        "optimizer-cpu-offload",
    ):
        assert flag in flags
    assert rows()[0][1] == "(none)"


def test_times_are_those_that_the_page_says(tmp_path: Path) -> None:
    seconds = []
    for row in rows():
        config, training_rows = resolved(config_of(row, tmp_path), 8)
        seconds.append(f"{predicted(config, 8, training_rows, gpu_named('h100-80gb')).seconds:.1f}")
    assert seconds == [row[-1] for row in rows()]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0][1]} {row[1]}")
def test_the_command_prints_the_numbers_of_the_page(
    row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, _, device, host, seconds = row
    try:
        print_dry_run(config_of(row, tmp_path))
    except ValueError as error:
        assert float(device) > 72.1 and "needs" in str(error)
    shown = capsys.readouterr().out
    assert re.search(rf"^total +{re.escape(device)}$", shown, re.MULTILINE)
    assert f"predicted: {seconds} s per step" in shown
    assert ("host memory: " + host if host != "–" else "fit") in shown
