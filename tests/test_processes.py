"""How processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_longpo import processes
from megatron_longpo.processes import uninterrupted

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


def test_what_speaks_on_ctrl_c_is_let_go_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed later, by a thread while Python ends, a process group ends the process with SIGABRT."""
    freed_in: list[threading.Thread] = []

    class Trainer:
        def say(self) -> None: ...

        def __del__(self) -> None:
            freed_in.append(threading.current_thread())

    read = os.read
    monkeypatch.setattr(os, "read", lambda *arguments: (read(*arguments), time.sleep(0.2))[0])
    trainer = Trainer()
    with processes.one_voice_on_ctrl_c(trainer.say):
        pass
    del trainer
    assert freed_in == [threading.main_thread()]


def test_ctrl_c_that_is_for_others_stays_theirs() -> None:
    """As in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes.take_ctrl_c_once()
    with processes.one_voice_on_ctrl_c(lambda: pytest.fail("it was not for this process")):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)


def test_a_reader_that_has_seen_enough_of_a_message_is_no_failure() -> None:
    words = "from megatron_longpo import processes; processes.leave(0, lambda: print('a help page ' * 10**5))"
    process = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(20)) == (b"", 0)


INTERRUPTED = """
import ctypes, os, sys, threading, time
from megatron_longpo import processes

processes._CLEAN_UP_S = 0.5
def wait_for_a_rank_that_has_left():
    threading.Timer(0.3, os.write, [1, b"waits\\n"]).start()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
def lose_a_connection():
    try:
        os.write(1, b"waits\\n")
        time.sleep(60)
    finally:
        raise RuntimeError("Connection closed by peer")
def say(name):
    return lambda: print(name, end=" ", flush=True)

try:
    with processes.one_voice_on_ctrl_c(say("outer")), processes.one_voice_on_ctrl_c(say("inner")):
        if os.fork() == 0:
            os.write(1, b"forked\\n")
            time.sleep(60)
        {wait}()
except KeyboardInterrupt:
    print("cleaned up", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("wait", "rank", "said"),
    [
        ("lose_a_connection", "0", "inner cleaned up"),
        ("lose_a_connection", "1", "cleaned up"),
        ("wait_for_a_rank_that_has_left", "0", "inner"),
    ],
)
def test_ctrl_c_has_one_message_whatever_the_ranks_wait_for(wait: str, rank: str, said: str) -> None:
    # From Python 3.12 on a script that forks beside a thread is warned; of the fork of a data loader nothing is said.
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", INTERRUPTED.format(wait=wait)],
        env=os.environ | {"RANK": rank},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"forked\n", "waits\n"}
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output.strip()) == (130, said)


TWICE = """
import os, signal, time
from megatron_longpo import processes

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
def say(name):
    return lambda: print(name, end=" ", flush=True)

try:
    with processes.one_voice_on_ctrl_c(say("outer")):
        try:
            with processes.one_voice_on_ctrl_c(say("inner")):
                try:
                    press()
                finally:
                    press()
                    print("cleaned up", end=" ")
        finally:
            press()
            print("all of it", end=" ")
except KeyboardInterrupt:
    print("once")
"""


def test_what_cleans_up_after_ctrl_c_is_not_interrupted_by_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "inner cleaned up all of it once\n", "")


LOST = """
import os, signal
from megatron_longpo.processes import plain_ending

with plain_ending("read.py"):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        raise ValueError("could not import module 'LlamaConfig'")
"""


def test_an_interrupt_of_which_a_library_makes_an_error_is_one() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "read.py: stopped, nothing was written\n")


HANGS = """
import os, signal, time
from megatron_longpo import processes

processes._CLEAN_UP_S = 0.1
processes.take_sigterm_as_ctrl_c()
try:
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    for _ in range(20):
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_ends_a_process_whose_cleaning_up_hangs() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_block_that_is_not_to_be_interrupted_comes_to_its_end() -> None:
    finished = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            finished.append("inner")
        finished.append("outer")
    assert finished == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


WRITES = """
import os, signal, sys
from megatron_longpo.files import atomic_writer
from megatron_longpo.processes import plain_ending

where, number = sys.argv[1], signal.Signals[sys.argv[2]]
def stop(event, arguments):
    if event == where:
        os.kill(os.getpid(), number)
with plain_ending("write.py", "result"), atomic_writer("result") as file:
    file.write("all of it")
    sys.addaudithook(stop)
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("where", "said"), [("open", "nothing"), ("os.rename", "result")])
def test_a_program_that_is_stopped_says_whether_it_has_written(
    where: str, said: str, number: str, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", WRITES, where, number]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"write.py: stopped, {said} was written\n")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == ({} if said == "nothing" else {"result": "all of it"})
