"""The largest memory of a process: what it held for a moment counts, what its parent held does not."""

import subprocess
import sys

import numpy as np

from benchmarks.process_memory import peak, reset_peak

SIZE = 200 * 2**20  # bytes


def test_what_was_held_for_a_moment_counts_until_it_is_reset():
    reset_peak()
    before = peak()
    held = np.ones(SIZE, np.uint8)
    del held
    assert SIZE <= peak() - before < 1.5 * SIZE
    reset_peak()
    assert peak() < before + SIZE / 2


def test_a_process_does_not_begin_with_the_peak_of_the_one_that_started_it():
    held = np.ones(2 * SIZE, np.uint8)
    program = "from benchmarks.process_memory import peak; print(peak())"
    child = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 0 < child < len(held) < peak()
