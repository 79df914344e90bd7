"""From parsed flags to a run that can start: model, device and sizes filled in and checked before anything is built."""

from __future__ import annotations

import dataclasses

from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.tokenizer import load_tokenizer
from megatron_longpo.training.distributed import is_rank_0, world_size
from megatron_longpo.training.initial import with_initial_model
from megatron_longpo.validation import validate


def prepared(config: RunConfig) -> RunConfig:
    """The run with its model's shape and what the device decides, checked for this world size.

    Prints the resolved configuration on rank 0.

    Raises:
        ConfigError: Sizes or flags that cannot run, all of them at once.
        ValueError: The checkpoint that gives the model's shape cannot be read; ``--attention-backend`` has no library.
    """
    platform.prepare(config.training.use_cpu)
    config = with_initial_model(config)
    if config.data.data_path and not config.model.vocab_size:
        size = PreferenceDataset(config.data.data_path).vocab_size
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    config = config.with_device_defaults(*platform.device_defaults())
    validate(config, world_size())
    platform.use_attention_backend(config.training.attention_backend)
    if is_rank_0():
        print(f"configuration of this run:\n{config.to_yaml()}", flush=True)
        if config.window_note is not None:
            print(config.window_note, flush=True)
    return config


def open_dataset(config: RunConfig) -> PreferenceDataset:
    """The dataset of ``--data-path``, checked against the model's vocabulary and the tokenizer, if one is given.

    Raises:
        ValueError: It is missing, damaged, or of another tokenizer.
    """
    dataset = PreferenceDataset(config.data.data_path, config.model.vocab_size)
    settings = config.tokenizer
    if settings.tokenizer_model is not None:
        tokenizer = load_tokenizer(
            settings.tokenizer_model, settings.tokenizer_type, settings.chat_template, settings.trust_remote_code
        )
        theirs = dataset.manifest.tokenizer.get("hash")
        if theirs is not None and theirs != tokenizer.hash:
            raise ValueError(
                f"--tokenizer-model {settings.tokenizer_model} is not the tokenizer that --data-path "
                f"{config.data.data_path} was made with ({dataset.manifest.tokenizer.get('path')}): preprocess again, "
                "or give that tokenizer"
            )
    return dataset
