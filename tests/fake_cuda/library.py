"""Compiles ``guard.cpp``, once per version of torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).with_name("guard.cpp")


def guard_library(folder: Path) -> Path:
    """The compiled library. Skips the test without a compiler, and in torch's CUDA build, whose own guard and hooks ask
    for a device.

    Args:
        folder: Keeps it for the next time.
    """
    if torch.backends.cuda.is_built():
        pytest.skip("fake CUDA tensors need torch's CPU build: a CUDA build asks for a device")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("fake CUDA tensors in torch's CPU build need a C++ compiler (g++), and there is none")
    key = hashlib.sha256(f"{torch.__version__} {sysconfig.get_platform()} {SOURCE.read_text()}".encode()).hexdigest()
    library = folder / f"guard-{key[:16]}.so"
    if library.exists():
        return library
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        made = Path(partial, library.name)
        command = [
            *(compiler, "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(SOURCE), "-o", str(made)),
            *(f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        made.rename(library)
    return library
