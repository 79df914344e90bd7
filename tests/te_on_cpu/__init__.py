"""Transformer Engine's layers and optimizer in processes without a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = Path(sys.prefix, "transformer-engine")
"""Where ``make install`` unpacks the wheel: on no path, so that nothing imports it by accident."""


def environment() -> dict[str, str]:
    """Variables that let a new Python process, and all that it starts, find Transformer Engine."""
    here = Path(__file__).parent
    path = [str(here / "site"), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"LONGPO_TESTS_TRANSFORMER_ENGINE": str(FOLDER), "PYTHONPATH": os.pathsep.join(path)}
