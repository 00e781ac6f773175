"""The largest memory of a process: what it held for a moment counts, what its parent held does not."""

import subprocess
import sys

import numpy as np

from benchmarks.process_memory import peak

SIZE = 200 * 2**20  # bytes
# In a process of its own: of a large one, the system may take back pages meanwhile.
MOMENT = f"""
import numpy as np
from benchmarks.process_memory import peak, reset_peak
before = peak()
held = np.ones({SIZE}, np.uint8)
del held
print(peak() - before)
reset_peak()
print(peak() - before)
"""


def printed(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def test_what_was_held_for_a_moment_counts_until_it_is_reset():
    held, later = printed(MOMENT)
    assert 0.9 * SIZE < held < 1.5 * SIZE
    assert later < SIZE / 2


def test_a_process_does_not_begin_with_the_peak_of_the_one_that_started_it():
    held = np.ones(2 * SIZE, np.uint8)
    (child,) = printed("from benchmarks.process_memory import peak; print(peak())")
    assert 0 < child < len(held) < peak()
