"""Filling a model from a Hugging Face folder, and refusing folders that do not fit, before anything is changed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import Window
from megatron_longpo.conversion.hf_config import read_hf_model
from megatron_longpo.conversion.load import load_hf_weights
from megatron_longpo.conversion.logits import model_logits
from megatron_longpo.conversion.to_megatron import convert_to_megatron
from megatron_longpo.model.build import build_model
from megatron_longpo.training.checkpoint import Checkpointer
from megatron_longpo.training.checkpoint_checks import check_optimizer
from megatron_longpo.training.initial import load_initial_state, with_initial_model
from tests.conversion.models import MODELS, hf_logits, random_tokens, run_config, save_random_model

pytestmark = pytest.mark.usefixtures("world_of_one")


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = save_random_model(tmp_path, name)
    config = run_config(tmp_path)
    chunks = build_model(config)
    load_hf_weights(config, chunks, tmp_path)
    tokens, positions = random_tokens()
    expected = hf_logits(model, tokens, positions)
    assert (model_logits(config, chunks, tokens, positions) - expected).abs().max() < 1e-4
    # The positions matter: a rotary embedding without the model's scaling could not pass.
    near = hf_logits(model, tokens, torch.arange(len(tokens)))
    assert (near - expected).abs().max() > 1
    # So does the window.
    if name == "mistral-v0.1":
        model.config.sliding_window = 17
        assert (hf_logits(model, tokens, positions) - expected).abs().max() > 0.1


def test_bf16_weights_arrive_bit_for_bit(tmp_path: Path) -> None:
    model = save_random_model(tmp_path, "qwen3", torch.bfloat16)
    config = run_config(tmp_path, bf16=True)
    chunks = build_model(config)
    load_hf_weights(config, chunks, tmp_path)
    inner = chunks[0].module
    assert inner.output_layer.weight.dtype == torch.bfloat16
    assert inner.output_layer.weight[:131].equal(model.lm_head.weight)
    assert inner.output_layer.weight[131:].abs().max() == 0
    layer = model.model.layers[2]
    assert inner.decoder.layers[2].mlp.linear_fc1.weight.equal(
        torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
    )


def test_sharded_and_pickled_folders_give_the_same_model(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "one", "qwen2.5")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    config_file = (tmp_path / "one" / "config.json").read_bytes()
    for kind in ("pickled", "sharded-pickled"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_bytes(config_file)
    weights = model.state_dict()
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    places = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(weights)}
    for place in set(places.values()):
        part = {name: value for name, value in weights.items() if places[name] == place}
        torch.save(part, tmp_path / "sharded-pickled" / place)
    index = tmp_path / "sharded-pickled" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    states = []
    for kind in ("one", "sharded", "pickled", "sharded-pickled"):
        config = run_config(tmp_path / kind)
        chunks = build_model(config)
        load_hf_weights(config, chunks, tmp_path / kind)
        states.append(dict(chunks[0].named_parameters()))
    for name, value in states[0].items():
        assert all(value.equal(state[name]) for state in states[1:]), name


PICKLED: dict[str, tuple[Any, str]] = {
    "code": ({"model.norm.weight": functools.partial(print)}, r"holds more than weights \(functools.partial\), and is"),
    "a list": ([torch.ones(48)], r"holds a list, not a dictionary of tensors by name"),
    "a trainer's state": (
        {"state_dict": {}, "step": 3},
        r"it has state_dict \(dict\), step \(int\)",
    ),
    "other bytes": (b"<html>404</html>", r"is truncated or not a file of weights; download it again$"),
    "the old format": (None, r"is in torch's format before 1.6"),
}


@pytest.mark.parametrize("case", PICKLED)
def test_pickled_files_are_weights_or_refused(case: str, tmp_path: Path) -> None:
    content, message = PICKLED[case]
    weights = save_random_model(tmp_path, "llama2").state_dict()
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content or weights, path, _use_new_zipfile_serialization=content is not None)
    with pytest.raises(ValueError, match=rf"pytorch_model.bin.*{message}") as error:
        read_and_load(tmp_path)
    assert "weights_only" not in str(error.value), "advice that torch gives and nobody should take"


def read_and_load(folder: Path, **flags: Any) -> None:
    """Load into a model of ones; whatever is refused must leave it so."""
    config = run_config(folder, **flags)
    chunks = build_model(config)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(1.0)
    try:
        load_hf_weights(config, chunks, folder)
    except ValueError:
        assert all((parameter == 1.0).all() for parameter in chunks[0].parameters())
        raise


def _edit(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_unmapped_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save_random_model(tmp_path, "mistral-v0.2")
    _edit(
        tmp_path,
        **{
            "model.layers.3.mlp.up_proj.weight": None,
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(48),
            "model.norm.weight": torch.zeros(47),
        },
    )
    with pytest.raises(ValueError) as error:
        read_and_load(tmp_path)
    text = str(error.value)
    assert "tensors are missing: model.layers.3.mlp.up_proj.weight" in text
    assert "MistralForCausalLM has no place for the tensors: model.layers.0.self_attn.q_proj.bias" in text
    assert "model.norm.weight is [47], not [48]" in text


def test_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama2")
    _edit(tmp_path, **{"model.norm.weight": torch.zeros(48, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"not float32, bfloat16 or float16: model.norm.weight \(I8\)"):
        read_and_load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama2")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        read_and_load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_random_model(tmp_path / "one", "llama2").save_pretrained(tmp_path, max_shard_size="60KB")
    next(iter(sorted(tmp_path.glob("model-00002*")))).unlink()
    with pytest.raises(ValueError, match=r"lacks files that model.safetensors.index.json names: model-00002-of-"):
        read_and_load(tmp_path)


def test_an_index_that_names_absent_tensors_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path / "one", "llama2").save_pretrained(tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00005.safetensors"
    index["weight_map"] = {
        k: v.replace("00001-of-00005", _first_shard(tmp_path)) for k, v in index["weight_map"].items()
    }
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks tensors that the index names: model.ghost.weight"):
        read_and_load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_what_is_no_index_is_named(content: str, tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama2")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json is not an index of weights with a weight_map"):
        read_and_load(tmp_path)


def _first_shard(folder: Path) -> str:
    return sorted(folder.glob("model-*"))[0].stem.removeprefix("model-")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama2")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights: expected model.safetensors"):
        read_and_load(tmp_path)


def test_computed_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama2")
    _edit(tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    read_and_load(tmp_path)


def test_the_copy_of_a_tied_embedding_must_be_a_copy(tmp_path: Path) -> None:
    model = save_random_model(tmp_path, "llama3.2-tied")
    _edit(tmp_path, **{"lm_head.weight": model.model.embed_tokens.weight.detach().clone()})
    read_and_load(tmp_path)
    _edit(tmp_path, **{"lm_head.weight": torch.zeros(131, 48)})
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but lm_head.weight differs"):
        read_and_load(tmp_path)


def test_a_window_that_the_folder_cannot_be_exported_with_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path / "llama", "llama2")
    save_random_model(tmp_path / "mistral", "mistral-v0.2")
    for name in ("llama", "mistral"):
        config = parse_arguments([f"--load-hf={tmp_path / name}", "--window-size=15,0"])
        if name == "mistral":
            config = with_initial_model(config)
            assert (config.model.window_size, config.reference_window_size) == (Window(15, 0), Window())
            continue
        with pytest.raises(ValueError, match=r"--window-size 15,0: LlamaForCausalLM has no window"):
            with_initial_model(config)


def test_a_converted_checkpoint_gives_the_reference_what_the_model_was_before(tmp_path: Path) -> None:
    save_random_model(tmp_path / "hf", "mistral-v0.1")
    changed = {"rotary_base": 1e7, "window_size": Window()}
    convert_to_megatron(tmp_path / "hf", tmp_path / "megatron", show_progress=False, **changed)
    for flag in ("--pretrained-checkpoint", "--load"):
        config = with_initial_model(parse_arguments([f"{flag}={tmp_path / 'megatron'}", "--use-checkpoint-args"]))
        assert (config.model.rotary_base, config.model.window_size) == (1e7, Window())
        assert (config.reference_rotary_base, config.reference_window_size) == (1e4, Window(15, 0))
        shape = [*config.model_flags(), "--rotary-base=1e8"]
        config = with_initial_model(parse_arguments([f"{flag}={tmp_path / 'megatron'}", *shape]))
        assert (config.model.rotary_base, config.reference_rotary_base) == (1e8, 1e4)
        assert config.reference_window_size == Window(15, 0)
    # What a run saved is the reference of the next round as it is.
    (tmp_path / "megatron" / "release").rename(tmp_path / "megatron" / "iter_0000010")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("10")
    folder = tmp_path / "megatron"
    for words in ([f"--pretrained-checkpoint={folder}"], [f"--load={folder}", "--finetune"]):
        config = with_initial_model(parse_arguments([*words, "--use-checkpoint-args"]))
        assert (config.reference_rotary_base, config.reference_window_size) == (1e7, Window())
    # The run itself, going on at its newest step or at any other, keeps its own.
    for load in (folder, folder / "iter_0000010"):
        config = with_initial_model(parse_arguments([f"--load={load}", "--use-checkpoint-args"]))
        assert (config.reference_rotary_base, config.reference_window_size) == (1e4, Window(15, 0))


def test_a_checkpoint_of_another_program_leaves_the_reference_to_the_flags(tmp_path: Path) -> None:
    save_random_model(tmp_path / "hf", "llama2")
    convert_to_megatron(tmp_path / "hf", tmp_path / "megatron", show_progress=False)
    torch.save({}, tmp_path / "megatron" / "release" / "common.pt")
    flags = [f"--pretrained-checkpoint={tmp_path / 'megatron'}"]
    config = parse_arguments([*flags, "--num-layers=4", "--rotary-base=1e7"])
    assert with_initial_model(config) == config and config.reference_rotary_base == 1e7
    with pytest.raises(ValueError, match=r"release does not record its model's shape, .* instead of --use-check"):
        with_initial_model(parse_arguments([*flags, "--use-checkpoint-args"]))


def test_what_a_folder_must_hold_to_start_from_it(tmp_path: Path) -> None:
    config = parse_arguments([f"--pretrained-checkpoint={tmp_path}"])
    with pytest.raises(ValueError, match=rf"--pretrained-checkpoint {tmp_path} holds no checkpoint"):
        load_initial_state(config, Checkpointer(config, []))
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no optimizer state: give --no-load-optim to start with a"):
        check_optimizer(tmp_path, {}, config)


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path / "small", "llama2")
    save_random_model(tmp_path / "large", "llama2", num_hidden_layers=5)
    config = run_config(tmp_path / "large")
    chunks = build_model(run_config(tmp_path / "small"))
    with pytest.raises(ValueError, match=r"tensors are missing"):
        load_hf_weights(config, chunks, tmp_path / "small")
    assert read_hf_model(tmp_path / "large").num_layers == 5
