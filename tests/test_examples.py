"""The configurations of real size are accepted on the GPUs that their first line names, and fit them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.planning.dry_run_command import predicted, resolved
from megatron_longpo.planning.hardware import gpu_named
from tests.conversion.test_hf_config import LLAMA3_SCALING, LLAMA31_8B, MISTRAL_7B, QWEN25_7B
from tests.training.commands import run

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*/*k.yaml"))
LLAMA31: dict[str, Any] = LLAMA31_8B | {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}
MODELS = {
    "mistral_7b": MISTRAL_7B,
    "qwen2.5_7b": QWEN25_7B,
    "llama3.1_8b": LLAMA31,
    "llama3.1_70b": LLAMA31
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
PAGE = (EXAMPLES / "README.md").read_text()
NUM_DOCUMENTS = {"128k": 45_000, "256k": 16_000, "512k": 2_500, "qwen2.5_7b/128k.yaml": 32_000}
"""The paper's, by length; it trains Qwen2.5 on fewer."""
FIRST_LINE = re.compile(r"# .+ to (?P<length>\d+)K tokens on (?P<gpus>\d+) × (?P<gpu>\S+): (?P<layout>.+)\.")
MEMORY = re.compile(r"at most (?P<gib>[\d.]+) GiB per GPU")
SECONDS = re.compile(r"(?P<s>[\d.]+) s per document")


def flags(file: Path, folder: Path) -> tuple[list[str], re.Match[str]]:
    """What pretrain_longpo.py is given, with the model of the file's folder, and the file's first line."""
    (folder / "config.json").write_text(json.dumps(MODELS[file.parent.name]))
    first = FIRST_LINE.fullmatch(file.read_text().splitlines()[0])
    assert first is not None
    return [f"--config={file}", f"--load-hf={folder}", f"--save={folder}/run"], first


def test_every_model_has_every_length() -> None:
    assert {(file.parent.name, file.stem) for file in FILES} == {(m, f"{k}k") for m in MODELS for k in (128, 256, 512)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name} {file.stem}")
def test_is_accepted_and_says_what_it_does(file: Path, tmp_path: Path) -> None:
    words, first = flags(file, tmp_path)
    num_gpus = int(first["gpus"])
    config, rows = resolved(parse_arguments(words), num_gpus)
    parallel = config.parallel
    assert config.data.seq_length == config.model.max_position_embeddings == 1024 * int(first["length"])
    assert file.stem == f"{first['length']}k"
    sizes = {name: int(size) for name, size in re.findall(r"(TP|PP|CP|DP) (\d+)", first["layout"])}
    assert sizes == {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "DP": num_gpus // parallel.model_parallel_size,
    }
    assert parallel.cp_comm_type in first["layout"]
    # What the files leave out is the paper's.
    assert (config.objective.beta, config.objective.preference_weight, config.optimizer.lr) == (0.1, 0.01, 5e-7)
    assert config.training.global_batch_size == 8
    said = SECONDS.search(file.read_text())
    time = predicted(config, num_gpus, rows, gpu_named(first["gpu"]))
    assert said and said["s"] == f"{time.seconds_per_document:.2f}"


def test_the_table_of_the_page_is_that_of_the_files() -> None:
    rows = re.findall(r"^\|.*\]\((.+)\) \| (\d+) \|.*\| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert {file for file, *_ in rows} == {file.relative_to(EXAMPLES).as_posix() for file in FILES}
    for name, gpus, gib, seconds, days in rows:
        text = (EXAMPLES / name).read_text()
        first, memory, time = FIRST_LINE.search(text), MEMORY.search(text), SECONDS.search(text)
        assert first and memory and time
        assert (gpus, gib, seconds) == (first["gpus"], memory["gib"], time["s"]), name
        num_documents = NUM_DOCUMENTS.get(name, NUM_DOCUMENTS[Path(name).stem])
        assert f"{num_documents * float(seconds) / 86400:.1f}" == days and f"{num_documents:,}" in PAGE, name


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name} {file.stem}")
def test_fits_its_gpus(file: Path, tmp_path: Path) -> None:
    words, first = flags(file, tmp_path)
    output = run("pretrain_longpo.py", *words, "--dry-run", f"--num-gpus={first['gpus']}", f"--gpu={first['gpu']}")
    said, measured = MEMORY.search(file.read_text()), re.search(r"([\d.]+) GiB fits in", output)
    assert said is not None and measured is not None, output
    assert said["gib"] == measured[1]
