"""The settings of every benchmark are readable at once: --help loads no torch and lists each option with its text."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
CODE = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
loaded = {"torch", "deepspeed", "mlflow", "diffusers", "matplotlib", "jsonargparse"} & set(sys.modules)
assert not loaded, loaded
"""


def test_every_benchmark_is_looked_at():
    assert {"ablation", "evidence", "fvd", "gpu_acceptance", "train_memory", "zero_shot"} <= set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_loads_nothing_heavy_and_explains_every_option(name):
    command = [sys.executable, "-c", CODE, str(ROOT / "benchmarks" / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py")
    lines = done.stdout.splitlines()
    options = [k for k, line in enumerate(lines) if line.startswith("  --")]
    assert len(options) > 2
    for k in options:
        text = lines[k].strip().partition("  ")[2] or lines[k + 1].strip()
        assert text, f"{lines[k]} has no text"
