"""The largest memory of this process so far, as Linux counts it.

`getrusage` does not serve: a process begins with the number of the one that started it.
"""

import contextlib
import math
import re
from pathlib import Path


def reset_peak() -> None:
    """Start again from the memory of now; does nothing where Linux does not allow it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Largest memory of the process in bytes, since its start or since `reset_peak`; NaN on other systems."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024.0 if found else math.nan
    return math.nan
