"""Python runs this when it starts, in every process whose environment `tests.te_on_cpu.environment` made."""

from __future__ import annotations

import importlib.abc
import os
import sys
from typing import Any

FOLDER = os.environ.get("LONGPO_TESTS_TRANSFORMER_ENGINE")


class BeforeMegatron(importlib.abc.MetaPathFinder):
    """Finds nothing, and installs Transformer Engine before Megatron-Core looks for it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Called with the name of every module that is about to be imported."""
        if fullname in ("megatron.core", "transformer_engine") and FOLDER:
            sys.meta_path.remove(self)
            from tests.te_on_cpu.install import install

            install(FOLDER)


sys.meta_path.insert(0, BeforeMegatron())
