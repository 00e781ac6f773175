"""What a run was made by: the state of the code, the packages, the machine."""

import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch


def _git(*words: str) -> str:
    """What git says about the checkout that this code lies in; empty outside one."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, errors="replace").stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def git_commit() -> str:
    """The commit of the code that runs, with `-dirty` where files differ from it; empty outside a checkout."""
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()


def git_patch() -> str:
    """What the code that runs changes of its commit, as a patch; without files that git does not know."""
    return _git("diff", "HEAD", "--", ":/")


def environment() -> dict[str, Any]:
    """The commit, the versions of all packages, and the machine."""
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "packages": dict(sorted({d.name: d.version for d in distributions() if d.name}.items())),
    }
