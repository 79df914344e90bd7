"""Peak memory of a conversion does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conversion.models import save_random_model

MEASURED = """
import json, sys
from pathlib import Path
from megatron_longpo.conversion.to_hf import convert_to_hf
from megatron_longpo.conversion.to_megatron import convert_to_megatron

def rss(field):
    return int(Path("/proc/self/status").read_text().partition(field)[2].split()[0]) * 1024

def growth(work):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = rss("VmRSS:")
    work()
    return rss("VmHWM:") - before

def work(folder):
    hf, megatron, back = (folder / name for name in ("hf", "megatron", "back"))
    return {
        "to_megatron": lambda: convert_to_megatron(hf, megatron, show_progress=False),
        "to_hf": lambda: convert_to_hf(megatron, hf, back, show_progress=False),
    }

small, large = map(Path, sys.argv[1:])
for one in work(small).values():  # imports everything
    one()
print(json.dumps({name: growth(one) for name, one in work(large).items()}))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's resettable peak")
def test_peak_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    save_random_model(tmp_path / "small" / "hf", "llama2")
    save_random_model(tmp_path / "large" / "hf", "llama2", **shape, max_shard_size="1GB")
    size = sum(path.stat().st_size for path in (tmp_path / "large" / "hf").glob("*.safetensors"))
    words = [str(tmp_path / name) for name in ("small", "large")]
    result = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown = json.loads(result.stdout.splitlines()[-1])
    # The largest parameters are 8 MiB; allocator and file buffers are the rest.
    assert size > 200 * 2**20
    assert max(grown.values()) < 60 * 2**20, grown
