"""Starts a rank on Slurm: `start.py ARGUMENTS OF PYTHON`. Signals that come before it listens wait until it does.

A time limit's signal can come while Python still imports, and would end the process. Blocked, it stays pending until
`fvdm.distributed.StopFlag` has its handlers and lets it through.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
