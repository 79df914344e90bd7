"""Opt-in: nvidia-modelopt's own Hugging Face ↔ Megatron maps agree with ours, weight for weight.

pip install 'megatron_longpo[export]', then pytest -m slow tests/conversion/test_oracle_modelopt.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_longpo.conversion.load import load_hf_weights
from megatron_longpo.model.build import build_model, unwrap
from tests.conversion.models import run_config, save_random_model, weights_of

pytest.importorskip("modelopt")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("world_of_one")]

# Its maps have no Mistral, whose tensors are Llama's; tied embeddings it writes twice.
MODELS = ["llama2", "llama3.1", "qwen2.5", "qwen3"]


@pytest.mark.parametrize("name", MODELS)
def test_its_importer_fills_the_model_as_ours_does(name: str, tmp_path: Path) -> None:
    from modelopt.torch.export import import_mcore_gpt_from_hf

    _save(tmp_path, name)
    config = run_config(tmp_path, make_vocab_size_divisible_by=1)  # it knows no padding
    (ours,), (theirs,) = build_model(config), build_model(config)
    load_hf_weights(config, [ours], tmp_path)
    import_mcore_gpt_from_hf(unwrap(theirs), str(tmp_path), dtype=torch.float32)
    for (key, value), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert value.equal(other), key


@pytest.mark.parametrize("name", MODELS)
def test_its_exporter_undoes_our_import(name: str, tmp_path: Path) -> None:
    from modelopt.torch.export import export_mcore_gpt_to_hf, unified_export_megatron

    if not hasattr(unified_export_megatron, "LLaVAModel"):
        pytest.skip("the exporter of this modelopt needs a newer megatron-core: its imports of it failed unsaid")
    _save(tmp_path / "hf", name)
    config = run_config(tmp_path / "hf")
    chunks = build_model(config)
    load_hf_weights(config, chunks, tmp_path / "hf")
    export_mcore_gpt_to_hf(
        unwrap(chunks[0]), str(tmp_path / "hf"), dtype=torch.float32, export_dir=str(tmp_path / "back")
    )
    ours, theirs = weights_of(tmp_path / "hf"), weights_of(tmp_path / "back")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.equal(theirs[key][: value.shape[0]]), key


def _save(folder: Path, name: str) -> None:
    """A folder with an index, without which the importer does not know which file has what."""
    save_random_model(folder / "one", name).save_pretrained(folder, max_shard_size="100KB")
    shutil.rmtree(folder / "one")
    # Its exporter copies the tokenizer, and cannot do without one.
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(131)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
