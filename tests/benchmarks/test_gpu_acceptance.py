"""benchmarks/gpu_acceptance.py: every part on the CPU, results that are written at once and not measured again."""

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_acceptance, train_memory
from benchmarks.acceptance.attention import judge_auto
from benchmarks.acceptance.config import PARTS
from benchmarks.acceptance.record import DONE, LeftOutError, Outcome, Record

ROOT = Path(__file__).parents[2]


def program(*words, folder, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_acceptance.py"), *words],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def without_mlflow(folder):
    """A PYTHONPATH on which MLflow cannot be imported; flash-attn is not installed where there is no GPU."""
    (folder / "mlflow").mkdir(parents=True)
    (folder / "mlflow" / "__init__.py").write_text("raise ImportError('hidden by the test')\n")
    return f"{folder}:{ROOT}"


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_without_mlflow_a_hub_or_flash_attn(tmp_path):
    hidden = {"PYTHONPATH": without_mlflow(tmp_path / "hidden"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = program("--device", "cpu", "--smoke", "--out", "out", folder=tmp_path, **hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS:
        found = json.loads((tmp_path / "out" / f"{part}.json").read_text())
        assert found["checks"], part
        assert {check["state"] for check in found["checks"].values()} <= set(DONE), found
        assert found["machine"]["torch"] == torch.__version__
        table = (tmp_path / "out" / f"{part}.md").read_text()
        assert all(f"| {name.replace('|', '/')} |" in table for name in found["checks"])
        assert table in (tmp_path / "out" / "summary.md").read_text()
    checks = json.loads((tmp_path / "out" / "attention.json").read_text())["checks"]
    left_out = {name.rpartition(": ")[2] for name, check in checks.items() if check["state"] == "left out"}
    assert {"flash", "cuDNN"} <= left_out
    training = json.loads((tmp_path / "out" / "training.json").read_text())["checks"]
    resumed = training["the stop signal, and the same command again"]["values"]
    assert resumed["largest difference of losses"] == 0


def test_a_machine_without_a_gpu_is_told_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_acceptance.main(["--part", "speed"])
    assert stopped.value.code == 2
    assert "has no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_are_written_at_once_and_finished_checks_are_not_repeated(tmp_path):
    calls = []

    def measure(name, outcome):
        def function():
            calls.append(name)
            assert not calls[:-1] or (tmp_path / "speed.json").exists(), "the check before is on disk"
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return function

    def start(settings):
        record = Record("speed", settings, "cpu", tmp_path)
        record.check("good", measure("good", Outcome({"ms": 1.5}, True, "2")))
        record.check("bad", measure("bad", Outcome({"ms": 3.0}, False, "2")))
        record.check("broken", measure("broken", RuntimeError("CUDA error\nmore")))
        record.check("absent", measure("absent", LeftOutError("no compiler")))
        return record

    record = start({"model": "XL/2"})
    assert record.failed == ["bad", "broken"]
    assert calls == ["good", "bad", "broken", "absent"]
    found = json.loads(record.file.read_text())
    assert found["checks"]["broken"]["reason"] == "RuntimeError: CUDA error"
    assert found["checks"]["absent"]["reason"] == "no compiler"
    assert "| good | ms 1.5 | 2 | passed |" in record.file.with_suffix(".md").read_text()
    calls.clear()
    start({"model": "XL/2"})
    assert calls == ["bad", "broken"], "what failed is tried again, and nothing else"
    calls.clear()
    start({"model": "S/2"})
    assert len(calls) == 4, "results of another network do not count"


@pytest.mark.parametrize(("auto", "passed"), [(1.05, True), (1.5, False)])
def test_auto_is_judged_by_the_fastest_backend(tmp_path, auto, passed):
    record = Record("attention", {}, "cpu", tmp_path)
    record.device = "cuda"
    for name, time in (("auto", auto), ("sdpa", 1.0), ("math", 2.0)):
        outcome = Outcome({"forward + backward, ms": time})
        record.check(f"space: {name}", lambda outcome=outcome: outcome)
    record.check("time: sdpa", lambda: Outcome({"forward + backward, ms": 0.1}))
    found = judge_auto(record, "space")
    assert found.good == passed
    assert found.values["fastest"] == "sdpa"


def test_the_peak_of_a_gpu_has_its_context_and_what_was_given_back(monkeypatch):
    """The driver's and the allocator's numbers are made up: 40 GB of 80 in use, 30 of them reserved, 36 at most."""
    made_up = {"mem_get_info": (40e9, 80e9), "memory_reserved": 30e9, "max_memory_reserved": 36e9}
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert train_memory.peak(torch.device("cuda", 0)) == 46e9


def test_deepspeed_is_new_enough_for_overlap():
    """Before 0.19.3 gradients that are reduced during the backward pass may be NaN, and compiled hooks race."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (needed,) = [line for line in setup["options"]["install_requires"].split() if line.startswith("deepspeed")]
    assert tuple(map(int, needed.partition(">=")[2].split("."))) >= (0, 19, 3)
