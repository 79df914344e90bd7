"""``--config FILE.yaml``: mistakes named with their line, groups or none, either kind of dash."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.config import ConfigError
from megatron_longpo.config.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- lr\n", "must map flags to values"),
        ("lr: [1, 2\n", "is not YAML"),
        ("lr: 1e-6\n\nlearning-rat: 2\n", ":3: learning-rat is not a flag"),
        ("num-layer: 2\n", ":1: num-layer is not a flag; did you mean num_layers?"),
        ("preference-weight: 2\n", ":1: preference-weight is not a flag; did you mean lambda?"),
        ("bf16: true\ntp_comm-overlap: true\n", ":2: tp_comm-overlap is not offered: Transformer"),
        ("optimiser:\n  lr: 1.0\n", ":1: optimiser is not a group of flags; did you mean optimizer?"),
        ("training:\n  lr: 1.0\n", ":2: lr belongs to group optimizer, not training"),
        ("lr: 1.0\noptimizer:\n  lr: 2.0\n", ":3: lr is given a second time; first at "),
        ("lr: fast\n", ":1: lr 'fast' must be a finite number"),
        ("lr: yes\n", ":1: lr True must be a finite number"),
        ("lr: .nan\n", ":1: lr nan must be a finite number"),
        ("train-iters: 1.5\n", ":1: train-iters 1.5 must be a whole number"),
        ("bf16: 1\n", ":1: bf16 1 must be true or false"),
        ("wandb-project: 7\n", ":1: wandb-project 7 must be text that is not empty; write it in quotes"),
        ("recompute-modules: mlp\n", ":1: recompute-modules 'mlp' must be a list"),
        ("lr: !!python/object:os.system {}\n", ":1: lr takes a value, not a mapping"),
        ("bf16: !!bool maybe\n", ":1: bf16 is not a plain value"),
        ("save: !!timestamp x\n", ":1: save is not a plain value"),
        ("[" * 3000, "is not YAML: maximum recursion depth"),
        ("save: !!python/name:os.system\n", ":1: save is not a plain value"),
        ("turns: null\n", ":1: turns None must be text"),
        ("cp-comm-type: ring\n", "ring must be all_gather or a2a or p2p or a2a+p2p"),
    ],
)
def test_a_bad_yaml_file_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_yaml_file_may_have_groups_or_not_and_either_kind_of_dash(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "objective:\n  objective: dpo\n  lambda: 1\noptimizer: sgd\nmodel:\nlr: 5e-7\nglobal_batch_size: 4\nmin-lr: 0\n"
    )
    values, origins = read_yaml(path)
    expected = {
        "objective": "dpo",
        "lambda": 1.0,
        "optimizer": "sgd",
        "lr": 5e-7,
        "global_batch_size": 4,
        "min_lr": 0.0,
    }
    assert values == expected
    assert origins["lambda"] == f"{path}:3: lambda"


@pytest.mark.parametrize("path", ["missing.yaml", "."])
def test_a_yaml_file_that_cannot_be_read_is_an_error(path: str) -> None:
    with pytest.raises(ConfigError, match=r"--config \S+ cannot be read"):
        read_yaml(path)
