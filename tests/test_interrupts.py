"""Signals end a process that is inside one call of C, where no handler of Python runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUCK = """
import ctypes, sys
from h2o_cli.interrupts import interrupts
from runtime.errors import Cancelled

def for_ever():
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(lock)
    print("ready", flush=True)
    libc.pthread_mutex_lock(lock)

with interrupts.installed():
    with {block}:
        for_ever()
"""
RESPONSIVE = """
import time
from h2o_cli.interrupts import interrupts

with interrupts.installed(), interrupts.ending(lambda _: None, patient=True):
    print("ready", flush=True)
    for _ in range(3):
        while not interrupts.signal_number:
            time.sleep(0.01)
        interrupts.take()
        print("served", flush=True)
    time.sleep(2)
"""
HELD, PATIENT = "interrupts.held()", "interrupts.ending(lambda _: None, patient=True)"


@pytest.fixture
def start():
    """start(code): a process that has printed "ready"."""
    processes = []

    def run(code):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("block", [HELD, "interrupts.ending(lambda _: None)"])
def test_a_call_of_c_is_ended_in_time(start, block, number):
    process = start(STUCK.format(block=block))
    process.send_signal(number)
    start_s = time.monotonic()
    assert process.wait(10) == 128 + number
    assert 1 < time.monotonic() - start_s < 4


def test_a_second_signal_ends_a_call_of_c_at_once(start):
    process = start(STUCK.format(block=HELD))
    process.send_signal(signal.SIGINT)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    start_s = time.monotonic()
    assert process.wait(10) == 130
    assert time.monotonic() - start_s < 0.9


def test_where_a_signal_ends_the_work_only_a_second_one_ends_a_call_of_c(start):
    process = start(STUCK.format(block=PATIENT))
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_signals_that_are_served_end_nothing(start):
    process = start(RESPONSIVE)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "served\n"
    assert process.wait(10) == 0
