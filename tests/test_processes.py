"""How processes end."""

from __future__ import annotations

import subprocess
import sys

THREAD_THAT_STAYS = """
import threading
from megatron_longpo.processes import end_without_threads
threading.Thread(target=threading.Event().wait).start()
print("stopped", end="")
end_without_threads(130)
"""


def test_an_interrupted_process_waits_for_no_thread() -> None:
    done = subprocess.run([sys.executable, "-c", THREAD_THAT_STAYS], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (130, "stopped", "")
