"""Package metadata of megatron_longpo; `make install` installs it in editable mode with the extra `dev`.

Exact versions are not here but in constraints.txt, which `make install` applies.
"""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.8",
    "megatron-core>=0.16.1,<0.20",
    "psutil",  # megatron.core.dist_checkpointing imports it without declaring it
    "transformers>=4.56",
    "sentencepiece>=0.2.3",
    "jinja2",  # chat templates of bare SentencePiece models
    "safetensors",
    "numpy",
    "tensorboard",
    "tqdm",
    "matplotlib",
    "pyyaml",
]

EXTRAS = {
    # CUDA machines only: elsewhere it is a stub that raises on import, and takes megatron.core down with it.
    # Its compiled core is an extra of its own, here for the CUDA that the locked torch brings.
    "gpu": ["transformer-engine[pytorch,core_cu13]"],
    "wandb": ["wandb"],
    "eval": ["lm-eval"],
    # datatrove's inference runner and request cache; the answers' language; vLLM and SGLang are asked over HTTP.
    "generate": ["datatrove[io]>=0.10", "aiofiles", "aiohttp", "aiosqlite", "py3langid"],
    "export": ["nvidia-modelopt>=0.42,<0.48", "requests"],  # modelopt imports requests without declaring it
    # trl is an oracle in the tests and an opponent in the benchmark, never imported by the package.
    "dev": [
        "megatron_longpo[generate]",
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "types-PyYAML",
        "types-psutil",
        "types-tqdm",
        "trl",
    ],
}

setup(
    name="megatron_longpo",
    version="0.1.0",
    description="LongPO (short-to-long preference optimization) on Megatron-Core, from one CPU to many GPU nodes",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_longpo", "megatron_longpo.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
)
