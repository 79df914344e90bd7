"""Run the real command lines as a user does, in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from tests.distributed.harness import TIMEOUT_S, run_ranks
from tests.tiny import MODEL_FLAGS

REPOSITORY = Path(__file__).parents[2]
FLAGS = [
    *MODEL_FLAGS,
    "--seq-length=256",
    "--global-batch-size=2",
    "--split=80,20",
    "--eval-iters=0",
    "--num-workers=0",
    "--progress-bar=off",
]


def command(script: str, *flags: str, ranks: int = 1) -> list[str]:
    """The command line of a script; under torchrun when it has several ranks."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return [*start, str(REPOSITORY / script), *flags]


def environment() -> dict[str, str]:
    # Tests that start worlds of their own in this process leave their addresses behind.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "LOCAL_", "WORLD_", "GROUP_"))}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [clean.get("PYTHONPATH")])])
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def run(script: str, *flags: str, ranks: int = 1) -> str:
    """Run to the end, check that it succeeds, return stdout and stderr together."""
    done = subprocess.run(
        command(script, *flags, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    return _output_of(done.returncode, done.stdout + done.stderr)


def _output_of(code: int, output: str) -> str:
    assert code == 0, f"exit code {code}:\n{output[-6000:]}"
    return output


def run_in_one_process(commands: list[tuple[str, list[str]]]) -> list[tuple[int, str]]:
    """Run several one-rank command lines after one another in one fresh process; exit code and output of each.

    For commands that end early: what takes time then is the start of Python, paid once.
    """
    return run_ranks(_run_each, 1, commands)[0]


def _run_each(rank: int, commands: list[tuple[str, list[str]]]) -> list[tuple[int, str]]:
    return run_in_this_rank(commands)


def run_in_this_rank(commands: list[tuple[str, list[str]]]) -> list[tuple[int, str]]:
    """What `run_in_one_process` does, in the only rank of `run_ranks`."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return [_run_here(script, flags) for script, flags in commands]


def _run_here(script: str, flags: list[str]) -> tuple[int, str]:
    output, code = io.StringIO(), 0
    sys.argv = [str(REPOSITORY / script), *flags]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, output.getvalue()


def train(*flags: str, ranks: int = 1) -> str:
    return run("pretrain_longpo.py", *FLAGS, *flags, ranks=ranks)


def train_forked(*flags: str) -> str:
    """`train` without the seconds that a new Python needs: for runs whose start and exit are not what is tested."""
    return _output_of(*run_in_one_process([("pretrain_longpo.py", [*FLAGS, *flags])])[0])


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def stop_at_step(step: int, path: Path, how: signal.Signals, *flags: str, ranks: int = 1) -> tuple[int, str]:
    """Start training, send a signal once the metrics file shows a step, return exit code and output.

    SIGTERM goes to every process of the run at once, as schedulers send it.
    """
    process = subprocess.Popen(
        command("pretrain_longpo.py", *FLAGS, *flags, f"--metrics-jsonl={path}", ranks=ranks),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 150
    while not (path.exists() and len(path.read_text().splitlines()) >= step):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    for receiver in (process, *(children if how == signal.SIGTERM else ())):
        with contextlib.suppress(psutil.NoSuchProcess):  # a writer that is done
            receiver.send_signal(how)
    output, _ = process.communicate(timeout=100)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, f"outlived their parent: {[child.cmdline() for child in alive]}"
    return process.returncode, output
