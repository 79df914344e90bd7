"""Peak memory of a step's activations with each flag that saves some, relative to a step without any.

    python -m benchmarks.memory [--prefix-tokens 8192] [--response-tokens 128]

Counted, not sampled (`live_bytes`): what forward and backward pass allocate beside weights, gradients and optimizer.
Offloaded tensors are left out, as they are on a GPU; time is of this machine, on which offloading copies for nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.live_bytes import LiveBytes
from benchmarks.step.case import DATASET, WEIGHTS, StepCase, write_files
from benchmarks.step.summary import ROOT
from megatron_longpo.help_format import HelpFormatter, at_least_1

FULL = ("--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1")
KEPT = (*FULL, "--recompute-keep-attention")
OFFLOAD = "--cpu-offloading-num-layers={layers}"
PIECES = ("--mlp-chunk-tokens=1024", "--projection-chunk-tokens=1024")
NOTHING_REMADE = "outputs of norms and gates kept"
"""What no flag brings back: every tensor that autograd asks for."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "no recomputation": (),
    NOTHING_REMADE: (),
    "MLP in pieces of 1024": PIECES[:1],
    "in pieces of 1024": PIECES,
    "offload": (OFFLOAD,),
    "full recomputation": FULL,
    "attention kept": KEPT,
    "attention kept, in pieces": (*KEPT, *PIECES),
    "attention kept, offload": (*KEPT, OFFLOAD),
    "attention kept, offload, in pieces": (*KEPT, OFFLOAD, *PIECES),
}


def measure(folder: Path, name: str, case: StepCase) -> dict[str, float]:
    """Loss, peak GiB of activations and seconds of forward and backward pass, in this process."""
    from benchmarks.step.case import ReferenceNumbers
    from benchmarks.step.trainer import LONGPO, run_config, shared_prefix_batch
    from megatron_longpo.data.dataset import PreferenceDataset
    from megatron_longpo.model.remade import Remaking
    from megatron_longpo.training.distributed import initialize, shut_down
    from megatron_longpo.training.loop import Trainer
    from megatron_longpo.training.step import document_loss, run_schedule

    if name == NOTHING_REMADE:
        Remaking.note = lambda *_: None  # type: ignore[method-assign,assignment]
    flags = [flag.format(layers=case.num_layers) for flag in VARIANTS[name]]
    config = run_config(case, folder, [*LONGPO, f"--load-hf={folder / WEIGHTS}", *flags], 1)
    initialize(config)
    try:
        trainer = Trainer(config, PreferenceDataset(folder / DATASET))
        batch = shared_prefix_batch(config, trainer.dataset, ReferenceNumbers(case))

        def step() -> float:
            """Loss of one forward and backward pass, its gradients left in the buffers."""
            for chunk in trainer.chunks:
                chunk.zero_grad_buffer()
            outputs = run_schedule(
                config,
                trainer.chunks,
                [batch],
                lambda b, logps: document_loss(config.objective, b, logps),
                forward_only=False,
            )
            return outputs[0]["metrics"]["loss"].mean().item()

        step()  # a warm-up
        began = time.process_time()
        loss = step()
        seconds = time.process_time() - began
        with LiveBytes() as live, live.hosts_left_out():
            step()
        return {"loss": loss, "peak_gib": live.peak / 2**30, "on_host_gib": live.on_host / 2**30, "seconds": seconds}
    finally:
        shut_down()


def main() -> None:
    """Measure every variant in a process of its own and print the ratios."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--prefix-tokens", type=at_least_1, default=8192, metavar="N", help="length of the document")
    parser.add_argument("--response-tokens", type=at_least_1, default=128, metavar="N", help="length of both responses")
    parser.add_argument(
        "--num-layers", type=at_least_1, default=StepCase.num_layers, metavar="N", help="layers of the model"
    )
    parser.add_argument("--variant", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = ("prefix_tokens", "response_tokens", "num_layers")
    case = StepCase(**{name: getattr(arguments, name) for name in names})
    case.check()
    if arguments.variant:
        folder, name = arguments.variant
        print("RESULT", json.dumps(measure(Path(folder), name, case)))
        return
    sizes = [f"--{name.replace('_', '-')}={getattr(case, name)}" for name in names]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-memory-") as folder:
        write_files(case, Path(folder))
        for name in VARIANTS:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", *sizes, "--variant", folder, name],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LONGPO_USE_CPU": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr[-4000:])
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
            results[name] = json.loads(line.removeprefix("RESULT"))
            print(f"{name}: {results[name]}", file=sys.stderr)
    base = results["no recomputation"]
    print(f"| {dataclasses.asdict(case)} | peak of activations | time of forward and backward |\n| --- | --: | --: |")
    for name, result in results.items():
        assert abs(result["loss"] - base["loss"]) < 1e-5 * abs(base["loss"]), (name, result["loss"], base["loss"])
        peak, seconds = result["peak_gib"] / base["peak_gib"], result["seconds"] / base["seconds"]
        print(f"| {name} | {peak:.2f}x | {seconds:.2f}x |")


if __name__ == "__main__":
    main()
