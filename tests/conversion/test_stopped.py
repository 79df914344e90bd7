"""Conversions that are killed or stopped: nothing that looks complete, the old content or the new one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longpo.conversion import target
from tests.conversion.converting import to_hf, to_megatron

KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch._dynamo, transformers.models.auto, transformers.models.llama  # what each of them would import
from megatron_longpo.conversion import to_hf, to_megatron

class Progress(to_hf.tqdm):
    def update(self, n=1):
        super().update(n)
        if self.n > self.total / 2:
            os.kill(os.getpid(), number)

to_hf.tqdm = to_megatron.tqdm = Progress
hf, megatron, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for direction, name, save in cases:
    number = getattr(signal, name)
    if os.fork() == 0:
        if direction == "megatron":
            to_megatron.convert_to_megatron(hf, save, overwrite=True)
        else:
            to_hf.convert_to_hf(megatron, hf, save, overwrite=True, max_shard_bytes=20_000)
        os._exit(0)
    # Flushed, or a child's progress bar, which flushes stdout too, would print what it inherits.
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
MARKERS = {"megatron": "latest_checkpointed_iteration.txt", "hf": "config.json"}


def _kill(hf: Path, megatron: Path, cases: list[tuple[str, str, Path]]) -> list[int]:
    """Convert in processes that send themselves a signal half-way; returns their exit codes."""
    words = [str(hf), str(megatron), json.dumps(cases, default=str)]
    result = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]


def test_killed_half_way_leaves_nothing_that_looks_complete(llama: Path, tmp_path: Path) -> None:
    megatron = tmp_path / "megatron"
    to_megatron(llama, megatron)

    def convert(direction: str, save: Path) -> None:
        if direction == "megatron":
            to_megatron(llama, save)
        else:
            to_hf(megatron, llama, save)

    def content(save: Path) -> dict[Path, bytes]:
        files = (path for path in save.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files if ".partial" not in path.parts}

    fresh = {direction: tmp_path / f"fresh-{direction}" for direction in MARKERS}
    used = {direction: tmp_path / f"used-{direction}" for direction in MARKERS}
    for direction, save in used.items():
        convert(direction, save)
    before = {direction: content(save) for direction, save in used.items()}
    cases = [(direction, "SIGKILL", folders[direction]) for folders in (fresh, used) for direction in MARKERS]
    interrupted = tmp_path / "interrupted"
    codes = _kill(llama, megatron, [*cases, ("megatron", "SIGINT", interrupted)])
    assert codes == [-signal.SIGKILL] * 4 + [-signal.SIGINT]

    for direction, marker in MARKERS.items():
        # The partial result is there, out of sight; what was there before is untouched.
        assert any((used[direction] / ".partial").rglob("*"))
        assert content(used[direction]) == before[direction]
        assert [path.name for path in fresh[direction].iterdir()] == [".partial"]
        # Remains of a killed conversion are no content that --overwrite would be needed for.
        convert(direction, fresh[direction])
        assert (fresh[direction] / marker).exists()
        assert not (fresh[direction] / ".partial").exists()
    # Ctrl-C cleans up behind itself.
    assert not interrupted.exists()


def test_ctrl_c_while_the_old_content_goes_waits_for_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def interrupt(source: Path, target: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        rename(source, target)

    for content in ("old", "new"):
        with pytest.raises(KeyboardInterrupt), target.filled_folder(tmp_path / "save", (), last="last") as partial:
            for name in ("first", "last"):
                (partial / name).write_text(content)
            monkeypatch.setattr(os, "rename", interrupt)
        found = {path.name: path.read_text() for path in (tmp_path / "save").iterdir()}
        assert found == {"first": content, "last": content}


def test_ctrl_c_while_the_remains_go_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def interrupt(folder: Path, ignore_errors: bool) -> None:
        if folder.exists():
            signal.raise_signal(signal.SIGINT)
        rmtree(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt), target.filled_folder(tmp_path / "save", (), last="last") as partial:
        (partial / "last").touch()
    assert [path.name for path in (tmp_path / "save").iterdir()] == ["last"]
    with pytest.raises(KeyboardInterrupt), target.filled_folder(tmp_path / "new", (), last="last"):
        raise ValueError
    assert not (tmp_path / "new").exists()


STOPPED = """
import os, runpy, signal, sys
def stop(event, arguments):
    if event == "os.mkdir" and str(arguments[0]).endswith(".partial"):
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(stop)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_sigterm_cleans_up_like_ctrl_c(llama: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    words = ["hf-to-megatron", "--hf-model", str(llama), "--save", str(tmp_path / "save")]
    command = [sys.executable, "-W", "ignore", "-c", STOPPED, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "convert_checkpoint.py: interrupted\n")
    assert not (tmp_path / "save").exists()
