"""What every command does with errors and signals, as processes."""

import signal
import subprocess
import sys
import time

import pytest

WAITS = """
import signal, sys, time
from jepa_jax.command import errors_as_lines
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background has none
with errors_as_lines("stopped before the end"):
    try:
        print("ready", flush=True)
        time.sleep(600)
    except Exception:
        print("taken for an error")
    finally:
        print("cleaned up", flush=True)
"""
RAISES = """
import sys
from jepa_jax.command import errors_as_lines
with errors_as_lines(""):
    {}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_the_training_cleans_up_and_is_one_line(number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (out, err) == ("cleaned up\n", "error: stopped before the end\n")


COLLECTS = """
import gc, signal, sys, time
from jepa_jax.command import errors_as_lines
from jepa_jax.signals import stop_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
def callback(phase, info):
    gc.callbacks.remove(callback)
    signal.raise_signal(signal.{number})
with errors_as_lines("interrupted"){inner}:
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("inner", ["", ", stop_on_signals('interrupted')"])
def test_a_signal_that_the_collector_swallows_comes_again(number, inner):
    code = COLLECTS.format(number=number.name, inner=inner)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (found.returncode, found.stderr) == (128 + number, "error: interrupted\n")


TIDIES_UP = """
import atexit, signal, sys, time
from jepa_jax.command import ends_at_once, errors_as_lines, fail
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(time.sleep, 600)
with ends_at_once(), errors_as_lines(""):
    print("ready", flush=True)
    fail("some error", 3)
"""


WAITS_FOR_A_THREAD = """
import sys, threading, time
from jepa_jax import command
command._MOST_SECONDS_TO_END = 0.5
threading.Thread(target=time.sleep, args=(600,)).start()
with command.ends_at_once():
    {}
"""


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("print('done')", 0, ""),
        ("command.fail('some error', 3)", 3, "error: some error\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_a_thread_that_never_ends_does_not_hold_up_the_end(what, code, line):
    found = subprocess.run(
        [sys.executable, "-c", WAITS_FOR_A_THREAD.format(what)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (found.returncode, found.stderr) == (code, line)


TAKES_APART = """
import atexit
from jepa_jax.command import ends_at_once
class Held:
    def __del__(self):
        print("taken apart", flush=True)
held = Held()
atexit.register(print, "tidied up")
with ends_at_once():
    {}
"""


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [("pass", 0, "tidied up\ntaken apart\n"), ("raise KeyboardInterrupt", 130, "tidied up\n")],
)
def test_an_interrupted_command_is_not_taken_apart_under_what_still_runs(what, code, said):
    found = subprocess.run(
        [sys.executable, "-c", TAKES_APART.format(what)], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (code, said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_python_tidies_up_ends_it_without_a_word(number):
    process = subprocess.Popen(
        [sys.executable, "-c", TIDIES_UP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "error: some error\n"
    time.sleep(0.5)  # Python ends its main thread meanwhile
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -number


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("open('/nowhere/at/all')", "error: /nowhere/at/all: No such file or directory"),
        ("raise OSError(28, 'No space left on device')", "error: No space left on device"),
        ("bytearray(2**62)", "error: this machine has not enough memory for that"),
        (
            "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 B')",
            "error: the device has not enough memory for that: use a smaller batch or model",
        ),
        (
            "from jepa_jax.errors import DataError; raise DataError('a\\nb\\x1b[31m \\udcff')",
            "error: a b?[31m ?",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line(what, line):
    code = RAISES.format(what)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (2, f"{line}\n")
