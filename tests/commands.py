"""The console command `fvdm`, run in the process of the test: most of what a start costs is the imports."""

import contextlib
import io
import subprocess

from fvdm.cli.main import main


def fvdm(*words):
    """Run a command; its exit status and what it prints. An error that is no sentence is raised, and fails the test."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
