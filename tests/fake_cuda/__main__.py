"""Traces cases by name and writes what was found as JSON: ``python -m tests.fake_cuda LIBRARY RESULT CASE ...``."""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
import warnings
from pathlib import Path

RATES = "rates"
"""What the GPU benchmark measures of kernels, in place of a training step."""


def main(library: str, result: str, *names: str) -> None:
    """Args: the compiled guard, the file to write, the cases."""
    ctypes.CDLL(library)
    # Imported before, Megatron-Core leaves torch's compiler out, which takes as long as all the rest.
    import megatron_longpo.platform  # noqa: F401
    from tests.fake_cuda.device import pretend

    pretend()
    from tests.fake_cuda.cases import QUICK, THOROUGH
    from tests.fake_cuda.tracing import trace_rates, trace_run

    cases = QUICK | THOROUGH

    found = {}
    for name in names:
        try:
            found[name] = trace_rates() if name == RATES else trace_run(cases[name])
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
