"""The embedded engine with a tokenizer, and the pipeline with it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from megatron_longpo.data.tokenizer import load_tokenizer
from megatron_longpo.generation.engine import Answer, EngineError, Request
from megatron_longpo.generation.output import PAIRS, prepare_output, write_results
from megatron_longpo.generation.runner import run_task
from megatron_longpo.generation.settings import GenerationSettings
from megatron_longpo.generation.transformers_engine import TransformersEngine
from megatron_longpo.pairs import PreferenceDocument, read_pairs
from tests.generation.conftest import Settings


@pytest.fixture(scope="module")
def model_folder(huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose words are real tokens: it babbles, and never the same about two texts."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=900,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=0.3,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("model")
    MistralForCausalLM(config).save_pretrained(folder)
    for path in huggingface_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def embedded(settings: Settings, model: Path, **changes: object) -> GenerationSettings:
    values = {"engine": "transformers", "model": str(model), "base_url": None, "tokenizer_model": None, "device": "cpu"}
    limits = {"max_answer_tokens": 8, "max_instruction_tokens": 8, "filters": (), "max_documents": 4}
    return settings(**{**values, **limits, **changes})


async def answers(settings: GenerationSettings, requests: list[Request]) -> list[Answer]:
    async with TransformersEngine(settings) as engine:
        return engine.answer(requests)


def test_answers_are_those_of_transformers(settings: Settings, model_folder: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    chosen = embedded(settings, model_folder)
    tokenizer = load_tokenizer(model_folder)
    model = MistralForCausalLM.from_pretrained(model_folder).eval()
    prompts = ["Name the first word of the text.", "And the second?"]
    found = asyncio.run(answers(chosen, [Request(prompt, 8) for prompt in prompts]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    for prompt, answer in zip(prompts, found, strict=True):
        text = tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        inputs = torch.tensor(tokenizer.encode(text)[0])[None].long()
        with torch.inference_mode():
            expected = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=8, do_sample=False)
        new = expected[0, inputs.shape[1] :].tolist()
        assert answer.text == tokenizer.decode([t for t in new if t != 2], special=False)
        assert answer.num_prompt_tokens == inputs.shape[1]
        assert answer.cut_off == (2 not in new)


def test_a_number_format_and_several_ends_of_a_turn(settings: Settings, model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [2, 5]}
    (folder / "generation_config.json").write_text(json.dumps(generation))

    async def opened() -> tuple[torch.dtype, frozenset[int | None]]:
        async with TransformersEngine(embedded(settings, folder, dtype="bf16")) as engine:
            return engine._model.dtype, engine._stop_ids

    assert asyncio.run(opened()) == (torch.bfloat16, {2, 5})


def test_a_template_for_tokenizers_that_have_none(
    settings: Settings, model_folder: Path, sentencepiece_file: Path, inst_template_file: Path, tmp_path: Path
) -> None:
    prompt = "Name the first word of the text."
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("chat_template.jinja"))
    for path in (bare, sentencepiece_file):
        changes = {"tokenizer_model": str(path), "output": str(tmp_path / f"pairs-{path.name}")}
        with pytest.raises(ValueError, match=r"chat template: pass one with --chat-template FILE.jinja"):
            prepare_output(embedded(settings, model_folder, **changes))
        chosen = embedded(settings, model_folder, chat_template=str(inst_template_file), **changes)
        prepare_output(chosen)
        (answer,) = asyncio.run(answers(chosen, [Request(prompt, 8)]))
        tokenizer = load_tokenizer(path, chat_template=str(inst_template_file))
        text = tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        assert "[INST]" in text and answer.num_prompt_tokens == len(tokenizer.encode(text)[0])


def test_templates_are_told_not_to_think_and_thoughts_stop_the_run(
    settings: Settings, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "thinking.jinja"
    template.write_text(
        "{{ messages[0].content }}{% if enable_thinking is defined and enable_thinking is false %} empty{% endif %}"
    )
    chosen = embedded(settings, model_folder, chat_template=str(template))
    (answer,) = asyncio.run(answers(chosen, [Request("One prompt", 8)]))
    assert answer.num_prompt_tokens == len(load_tokenizer(model_folder).encode("One prompt empty")[0])
    prepare_output(chosen)
    monkeypatch.setattr(
        TransformersEngine, "answer", lambda self, requests: [Answer("Hm.\n</think>\n\n1. Go.", False)] * len(requests)
    )
    with pytest.raises(EngineError, match=r"--model .* writes down its thoughts, .*: give --chat-template FILE"):
        run_task(chosen)


def test_going_on_with_another_template_is_refused(
    settings: Settings, model_folder: Path, inst_template_file: Path, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(inst_template_file.read_text())
    chosen = embedded(settings, model_folder, chat_template=str(template))
    prepare_output(chosen)
    prepare_output(chosen)
    with pytest.raises(ValueError, match=r"--chat-template was '.*chat.jinja', now None"):
        prepare_output(embedded(settings, model_folder))
    template.write_text("{% set new = 1 %}" + inst_template_file.read_text())
    with pytest.raises(ValueError, match="the wording of the prompts, or the chat template, changed"):
        prepare_output(chosen)


def test_a_run_that_cannot_start_leaves_its_folder_free(settings: Settings, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model .* is no folder of a Hugging Face model: it has no config.json"):
        prepare_output(embedded(settings, tmp_path / "none"))
    prepare_output(embedded(settings, model_folder))


def test_another_rope_base_for_whole_documents_only(settings: Settings, model_folder: Path) -> None:
    prompt = "Say something about " + "the long and winding road " * 20
    requests = [[Request(prompt, 8)], [Request(prompt, 8, whole_document=True)]]

    def both(base: float | None) -> list[str]:
        chosen = embedded(settings, model_folder, long_rotary_base=base)
        return [asyncio.run(answers(chosen, request))[0].text for request in requests]

    plain, raised = both(None), both(100.0)
    assert plain[0] == plain[1] == raised[0] != raised[1]


def test_a_chunk_beyond_the_models_positions_drops_its_document(settings: Settings, model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    short = model_folder.parent / "short"
    short.mkdir(exist_ok=True)
    for path in model_folder.iterdir():
        (short / path.name).write_bytes(path.read_bytes())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    chosen = embedded(settings, short)
    prepare_output(chosen)
    run_task(chosen)
    with pytest.raises(ValueError, match=r"context length +4\n"):
        write_results(chosen)


def test_the_pipeline_with_the_embedded_engine(
    settings: Settings, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model writes no lists, so every reply is taken for one; all else is the real thing."""
    monkeypatch.setattr("megatron_longpo.generation.rollout.parse_pool", lambda reply: [f"Explain {reply!r}."])
    content = []
    for number, tasks in enumerate((1, 2)):
        chosen = embedded(settings, model_folder, num_tasks=tasks, output=f"{settings().output}-{number}")
        prepare_output(chosen)
        for task in range(tasks):
            run_task(chosen, task)
        write_results(chosen)
        content.append(Path(chosen.output, PAIRS).read_bytes())
    assert content[0] == content[1]
    rows = list(read_pairs(Path(chosen.output, PAIRS)))
    assert len(rows) == 4
    turns = [turn for row in rows if isinstance(row, PreferenceDocument) for turn in row.turns]
    assert len(turns) > 8
    assert len({turn.chosen for turn in turns}) > len(turns) // 2


def test_what_cannot_be_loaded_is_named(settings: Settings, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--device gpu cannot be used \(.*\): give another, or leave it out"):
        run_task(embedded(settings, model_folder, device="gpu"))
    shutil.copytree(model_folder, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 10_000)
    with pytest.raises(ValueError, match=r"--model .*cut: its weights cannot be read \(.*\); download them again"):
        run_task(embedded(settings, tmp_path / "cut"))
    shutil.copytree(model_folder, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*config.json", "*.safetensors"))
    config = GPT2Config(vocab_size=900, n_embd=16, n_layer=1, n_head=1, n_positions=64, eos_token_id=2, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"does not know the rotary embedding of GPT2LMHeadModel"):
        run_task(embedded(settings, tmp_path / "gpt2"))


def test_no_model(settings: Settings, tmp_path: Path, model_folder: Path) -> None:
    chosen = embedded(settings, tmp_path, tokenizer_model=str(model_folder))
    with pytest.raises(ValueError, match=r"--model .* is no folder of a Hugging Face model: it has no config.json"):
        run_task(chosen)
