"""The configuration dataclasses: derived sizes, checkpoints' models, and the ways to and from dictionaries and YAML."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import ConfigError, ModelConfig, RunConfig, Window
from megatron_longpo.config.flags import FLAGS, FlagSpec

LLAMA = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    group_query_attention=True,
    num_query_groups=2,
    rotary_base=5e5,
    use_rope_scaling=True,
    rope_scaling_factor=16.0,
    swiglu=True,
    disable_bias_linear=True,
    untie_embeddings_and_output_weights=True,
    vocab_size=1000,
)


def values_of(spec: FlagSpec) -> st.SearchStrategy[Any]:
    """Values that the flag accepts."""
    info = spec.info
    if info.choices is not None:
        choice = st.sampled_from(info.choices)
        values: st.SearchStrategy[Any] = st.lists(choice, min_size=1, unique=True) if spec.kind is tuple else choice
    elif spec.kind is bool:
        values = st.booleans()
    elif spec.kind is int:
        values = st.integers(int(info.at_least or 0), 2**40)
    elif spec.kind is tuple:
        values = st.lists(st.integers(int(info.at_least or 0), 2**40), min_size=1)
    elif spec.kind is float:
        low = info.at_least if info.at_least is not None else info.above
        values = st.floats(low, 1.0 if info.below else 1e12, exclude_min=info.at_least is None, exclude_max=True)
    elif spec.kind is Window:
        values = st.integers(-1, 2**40).map(lambda left: [left, 0])
    else:
        values = st.text(min_size=1).filter(lambda text: text.isprintable() or "\n" in text or "\t" in text)
    return st.none() | values if spec.optional else values


@st.composite
def flat_dictionaries(draw: st.DrawFn) -> dict[str, Any]:
    """Some flags with some values."""
    keys = draw(st.lists(st.sampled_from(list(FLAGS)), unique=True))
    return {key: draw(values_of(FLAGS[key])) for key in keys}


def with_effect(values: dict[str, Any]) -> RunConfig:
    """The configuration without the flags that have no effect: they never get past the command line."""
    while True:
        config = RunConfig.from_flat_dict(values, explicit=values)
        used = {key: value for key, value in values.items() if config.has_effect(key)}
        if used == values:
            return config
        values = used


@given(flat_dictionaries())
def test_a_flat_dictionary_goes_through_the_configuration_and_back(values: dict[str, Any]) -> None:
    config = RunConfig.from_flat_dict(values)
    flat = config.to_flat_dict()
    assert RunConfig.from_flat_dict(flat) == config
    assert set(flat) == set(FLAGS)
    for key, value in values.items():
        if value != 0:  # a size of 0 is derived
            assert flat[key] == value


@settings(deadline=None)
@given(flat_dictionaries())
def test_a_dumped_yaml_file_is_a_config_file_of_an_equal_run(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    config = with_effect(values)
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    config.dump_yaml(path)
    again = parse_arguments(["--config", str(path)])
    assert again == config
    assert again.to_yaml() == config.to_yaml()


@settings(deadline=None)
@given(flat_dictionaries())
def test_model_flags_make_the_same_model(values: dict[str, Any]) -> None:
    config = with_effect({key: value for key, value in values.items() if FLAGS[key].group == "model"})
    assert parse_arguments(config.model_flags()) == config


def test_the_dumped_file_is_plain_yaml_by_group(tmp_path: Path) -> None:
    config = parse_arguments(["--lr", "5e-7", "--train-iters", "3", "--save", "folder: odd # name\n2"])
    config.dump_yaml(tmp_path / "new" / "run.yaml")
    content = yaml.safe_load((tmp_path / "new" / "run.yaml").read_text())
    assert content["optimizer"]["lr"] == 5e-7
    assert content["training"]["train-iters"] == 3
    assert content["checkpoint"]["save"] == "folder: odd # name\n2"
    assert "train-epochs" not in content["training"], "it has no effect beside --train-iters"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.yaml"]


def test_the_configuration_is_frozen_and_hashable_and_travels_between_processes() -> None:
    config = parse_arguments(["--lr", "1e-6"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimizer.lr = 1.0  # type: ignore[misc]
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    assert pickle.loads(pickle.dumps(ConfigError("one", "two"))).errors == ("one", "two")


def test_derived_sizes_are_megatrons() -> None:
    model = ModelConfig(num_layers=2, hidden_size=256, num_attention_heads=8)
    assert (model.kv_channels, model.num_query_groups, model.ffn_hidden_size) == (32, 8, 640)
    assert dataclasses.replace(model, group_query_attention=True, num_query_groups=0).num_query_groups == 1
    model = dataclasses.replace(model, vocab_size=32001, make_vocab_size_divisible_by=128)
    assert model.padded_vocab_size(tensor_model_parallel_size=4) == 32256


def test_a_flat_dictionary_with_unknown_keys_and_wrong_values_names_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat_dict({"learning_rate": 1, "num_layer": 2, "lr": "fast", "beta": -1, "turns": "all"})
    assert caught.value.errors == (
        "learning_rate is not a flag's key",
        "num_layer is not a flag's key; did you mean num_layers?",
        "--lr 'fast' must be a finite number",
        "--beta -1.0 must be greater than 0",
        "--turns all must be joint or independent",
    )


def test_a_checkpoint_gives_the_model() -> None:
    config = parse_arguments(["--load-hf", "llama", "--num-layers", "4", "--rotary-base", "1e7"])
    assert config.awaits_model
    config = config.with_model(LLAMA, "--load-hf llama")
    assert not config.awaits_model
    assert config.model == dataclasses.replace(LLAMA, rotary_base=1e7)
    assert config.reference_rotary_base == config.objective.reference_rotary_base == 5e5
    assert config.source_model == LLAMA


def test_the_reference_base_can_be_given_and_is_the_trained_one_for_dpo() -> None:
    words = ["--load-hf", "llama", "--rotary-base", "1e7"]
    given = parse_arguments([*words, "--reference-rotary-base", "2e4"]).with_model(LLAMA)
    assert given.reference_rotary_base == 2e4
    assert parse_arguments([*words, "--objective", "dpo"]).with_model(LLAMA).reference_rotary_base == 1e7
    assert parse_arguments(["--rotary-base", "3e4"]).reference_rotary_base == 3e4


def test_a_window_is_the_checkpoints_unless_it_is_dropped() -> None:
    mistral = dataclasses.replace(LLAMA, window_size=Window(4095, 0))
    kept, dropped = (
        parse_arguments(["--load-hf", "mistral", *words]).with_model(mistral) for words in ([], ["--window-size=full"])
    )
    assert (kept.model.window_size, kept.reference_window_size) == ((4095, 0), (4095, 0))
    # The reference model is the one before training: its window stays.
    assert (dropped.model.window_size, dropped.reference_window_size) == (Window(), (4095, 0))
    assert "--reference-window-size" not in " ".join(dropped.model_flags())
    dpo = parse_arguments(["--load-hf", "mistral", "--window-size=full", "--objective=dpo"]).with_model(mistral)
    assert dpo.reference_window_size == Window()


@pytest.mark.parametrize("text", ["4095,0", "(4095, 0)", "full", "-1,0"])
def test_windows_as_megatron_reads_them(text: str) -> None:
    window = parse_arguments([f"--window-size={text}"]).model.window_size
    assert window == (Window(4095, 0) if "4095" in text else Window())
    assert window.num_tokens == (4096 if "4095" in text else None)
    assert Window.of(window.num_tokens) == window


def test_windows_in_checkpoints_of_megatron_lm() -> None:
    for stored, window in ((None, Window()), ((4095, 0), Window(4095, 0))):
        assert RunConfig.from_flat_dict({"window_size": stored}).model.window_size == window


@pytest.mark.parametrize("text", ["4096", "4095,1", "-2,0", "4095.0,0", "none", "a,0", "1,0,0"])
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--window-size '.*' must be full, or .* 4095,0"):
        parse_arguments([f"--window-size={text}"])


def test_flags_that_disagree_with_the_checkpoint_are_errors() -> None:
    config = parse_arguments(["--load-hf", "llama", "--num-layers", "2", "--add-qkv-bias", "--hidden-size", "256"])
    with pytest.raises(ConfigError) as caught:
        config.with_model(LLAMA, "--load-hf llama")
    assert caught.value.errors == (
        "--add-qkv-bias True disagrees with --load-hf llama, which has False; remove the flag",
        "--num-layers 2 disagrees with --load-hf llama, which has 4; remove the flag",
    )


def test_rope_scaling_may_differ_from_the_checkpoints() -> None:
    words = ["--load-hf", "llama"]
    other_factor = parse_arguments([*words, "--rope-scaling-factor", "32"]).with_model(LLAMA)
    assert other_factor.model == dataclasses.replace(LLAMA, rope_scaling_factor=32.0)
    plain = parse_arguments([*words, "--no-use-rope-scaling"]).with_model(LLAMA)
    assert plain.model == dataclasses.replace(LLAMA, use_rope_scaling=False, rope_scaling_factor=8.0)
    yarn = parse_arguments([*words, "--position-embedding-type", "yarn", "--yarn-rotary-scaling-factor", "4"])
    assert yarn.with_model(LLAMA).model == dataclasses.replace(
        plain.model, position_embedding_type="yarn", yarn_rotary_scaling_factor=4.0
    )
    with pytest.raises(ConfigError, match="--yarn-beta-fast 16 has no effect with --position-embedding-type rope"):
        parse_arguments([*words, "--yarn-beta-fast", "16"]).with_model(LLAMA)


def test_a_run_with_its_checkpoints_model_is_dumped_and_read_back(tmp_path: Path) -> None:
    config = parse_arguments(["--load-hf", "llama", "--rotary-base", "1e7"])
    before, after = tmp_path / "before.yaml", tmp_path / "after.yaml"
    config.dump_yaml(before)
    resolved = config.with_model(LLAMA).with_device_defaults("local", "gloo")
    resolved.dump_yaml(after)
    assert parse_arguments(["--config", str(before)]).with_model(LLAMA) == config.with_model(LLAMA)
    assert parse_arguments(["--config", str(after)]) == resolved
    assert parse_arguments(["--config", str(after)]).with_model(LLAMA) == resolved


def test_the_device_decides_what_is_auto() -> None:
    config = parse_arguments([]).with_device_defaults("local", "gloo")
    assert (config.training.transformer_impl, config.parallel.distributed_backend) == ("local", "gloo")
    given = parse_arguments(["--transformer-impl", "local", "--distributed-backend", "nccl"])
    assert given.with_device_defaults("transformer_engine", "gloo") == given
    fp8 = parse_arguments(["--fp8-format", "hybrid"])
    assert fp8.with_device_defaults("transformer_engine", "nccl").training.fp8_format == "hybrid"
    with pytest.raises(ConfigError, match="--fp8-format hybrid has no effect with --transformer-impl local"):
        fp8.with_device_defaults("local", "gloo")


@pytest.mark.parametrize(
    ("words", "multiple"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 2", 8),
        ("--fp8-format hybrid --bf16 --transformer-impl transformer_engine", 16),
        (
            "--fp8-format e4m3 --bf16 --transformer-impl transformer_engine --tensor-model-parallel-size 3 "
            "--sequence-parallel --context-parallel-size 2",
            96,
        ),
    ],
)
def test_rows_are_whole_blocks_on_every_rank(words: str, multiple: int) -> None:
    assert parse_arguments(words.split()).row_multiple == multiple
