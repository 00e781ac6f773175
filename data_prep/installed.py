"""Finds the installed packages for scripts that are run as files. Imports nothing but the standard library."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "av", "diffusers", "webdataset", "jsonargparse", "filelock", "tqdm", "mlflow", "submitit")


def require_packages() -> None:
    """Continue in the Python of `make install` where this one lacks packages; without one, say `make install` and end.

    Call it at the top of a script, before anything else is imported, and only where the script is run as a file.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != python.parents[1].resolve():
        os.execv(python, [str(python), *sys.argv])
    script = os.path.relpath(sys.argv[0])
    print(
        f"error: {sys.executable} has no package {missing[0]}; type: make install, then .venv/bin/python {script}",
        file=sys.stderr,
    )
    raise SystemExit(2)
