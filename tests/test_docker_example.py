"""What the Dockerfile runs, in an environment that has torch and nothing else, as NVIDIA's image has its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCKERFILE = (REPOSITORY / "examples" / "docker" / "Dockerfile").read_text()


@pytest.mark.slow
def test_its_steps_install_the_package_and_keep_torch(tmp_path: Path) -> None:
    """Downloads some 200 MB beside torch, which is that of this environment."""
    venv.create(tmp_path / "image", with_pip=True)
    python = tmp_path / "image" / "bin" / "python"
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    environment.pop("PYTHONPATH", None)

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path / "code", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    subprocess.run(["git", "clone", "-q", REPOSITORY, tmp_path / "code"], check=True)
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    run("pip", "install", "-qq", f"torch=={torch}")
    steps = re.findall(r"^RUN ((?:.*\\\n)*.*)", DOCKERFILE, re.MULTILINE)
    assert len(steps) == 1
    for step in steps:
        run("sh", "-ec", step.replace("/tmp/torch.txt", str(tmp_path / "torch.txt")))
    assert run("python", "-c", "import torch; print(torch.__version__)").strip() == torch
    assert "megatron-core" in run("pip", "list")
