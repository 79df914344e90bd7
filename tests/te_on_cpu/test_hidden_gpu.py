"""Where a GPU is hidden, Transformer Engine is there and its optimizer cannot be used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.te_on_cpu import FOLDER

STEP = """
from tests.te_on_cpu.install import install
install({folder!r})

import torch
import transformer_engine.pytorch.optimizers as kernels

def refuse(*_):
    raise RuntimeError("a kernel got a tensor that is not on a GPU")

for name in ("multi_tensor_l2norm", "multi_tensor_scale", "multi_tensor_scale_tensor"):
    setattr(kernels, name, refuse)
kernels.FusedAdam.step = refuse

from megatron_longpo import platform
from megatron_longpo.planning.replaced import replaced
with replaced(torch.cuda, "is_available", lambda: True):
    platform.prepare(use_cpu=True)

from megatron_longpo.training.distributed import initialize
from tests.planning.cases import measure_real_step, run_config

config = run_config("--bf16 --global-batch-size 2 --clip-grad 1e-6 {flags}")
initialize(config)
measure_real_step(config, 1)
"""


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no wheel of transformer-engine in {FOLDER}: make install")
@pytest.mark.parametrize("flags", [pytest.param("", marks=pytest.mark.slow), "--use-distributed-optimizer"])
def test_a_step_on_the_cpu_of_a_machine_with_a_gpu(flags: str) -> None:
    program = STEP.format(folder=str(FOLDER), flags=flags)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
