"""benchmarks/ablation.py and table1.py: real training runs, small; what is done is not done again."""

import json
import os

import pytest
import torch

from benchmarks import ablation, table1
from benchmarks.experiment import TrainingRun
from fvdm.config import split_words
from tests.data_fixtures import cut, write_video
from tests.generation.test_pipeline import make_run


@pytest.mark.slow
def test_the_figure_is_one_command_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    words = ["--smoke", "--out", "abl", "--every", "4"]
    ablation.main(words)
    out = tmp_path / "abl"
    rows = json.loads((out / "results.json").read_text())
    assert {(row["p"], row["sampler"]) for row in rows} == {(0.0, "ddim:2"), (1.0, "ddim:2"), (1.0, "ddpm:2")}
    assert all(row["fvd"] > 0 and row["step"] == 4 for row in rows)
    kept = {path: os.stat(path).st_mtime_ns for path in (out / "runs").rglob("manifest.json")}
    (out / "fvd" / "T-2_p0" / "00000004-ddim-2.json").unlink()
    capsys.readouterr()
    ablation.main(words)
    shown = capsys.readouterr().out
    assert "training runs: 2 of 2 done" in shown
    assert shown.count("FVD") == 1, "only what was missing is measured"
    assert {path: os.stat(path).st_mtime_ns for path in (out / "runs").rglob("manifest.json")} == kept
    assert json.loads((out / "results.json").read_text()) == rows

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ablation").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["kind"] == "ablation"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {"T-2_p0", "T-2_p1"}
    assert all("loss/mean" in run.data.metrics and "metrics/fvd_even_9f_ddim_2" in run.data.metrics for run in children)
    assert not parent.data.metrics
    assert "| fvd/T-2_p0_" in parent.data.tags["mlflow.note.content"]
    figures = {file.path for file in client.list_artifacts(parent.info.run_id, "figures")}
    assert figures == {"figures/p.png", "figures/samplers.png", "figures/models.png"}


def test_the_grid_is_the_papers():
    grid = ablation.Ablation(ablation.AblationConfig(out="x"), [])
    arms, trials = grid.arms(), grid.bench.trials
    assert len(arms) == 8 + 3, "eight p at the base size, three more sizes at the base p"
    assert len({arm.name for arm in arms}) == 11
    assert len(trials) == (11 + 2) * 10
    assert len({path for trial in trials for path in grid.bench.parts(trial)}) == len(trials)
    assert "--p=0.2" in grid.run(arms[0]).command
    assert arms[0].name == "S-2_p0.2"
    assert str(grid.bench.parts(trials[0])[0]) == "x/fvd/S-2_p0.2/00020000-ddim-50.json", "as earlier versions have it"


def test_words_that_are_no_options_are_settings_of_the_training_runs():
    words = ["--config", "x.yaml", "--p", "0", "0.5", "--base-p=0.5", "--data.path", "latents", "--engine.lr", "-1"]
    own, others = split_words(ablation.AblationConfig, [*words, "--no-smoke", "--clips", "8"])
    assert own == ["--p", "0", "0.5", "--base-p=0.5", "--no-smoke", "--clips", "8"]
    assert others == ["--config", "x.yaml", "--data.path", "latents", "--engine.lr", "-1"]


def test_a_run_in_the_queue_is_not_submitted_again(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\ncase $3 in fvdm-*) echo 7;; esac\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    grid = ablation.Ablation(ablation.AblationConfig(out=str(tmp_path), p=(0.0,), models=("S/2",), every=10), [])
    monkeypatch.setattr(TrainingRun, "command", property(lambda run: pytest.fail(f"{run} was submitted again")))
    assert not grid.train()
    grid.work()
    assert grid.bench.values() == {}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [([], "--real is missing"), (["--real", "x", "--samplers", "ddim"], "each is SOLVER:STEPS")],
)
def test_misuse_ends_with_a_sentence(tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        ablation.main([*words, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_table_1_holds_what_was_measured_and_what_has_a_source(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    run = make_run(tmp_path / "run")
    for k in range(2):
        write_video(tmp_path / "real" / f"{k}.mp4", cut(k, 12))
    published = tmp_path / "published.csv"
    rows = ["A,sky,9,12.5,styleganv,paper A", "A,ffs,9,9,own,paper A", "A,ffs,128,99,own,paper A"]
    published.write_text("\n".join(["method,dataset,frames,fvd,protocol,source", *rows]) + "\n")
    words = ["--real", "ffs=real", "--runs", f"ffs={run}", "--published", str(published)]
    words += ["--clips", "2", "--frames", "9", "--steps", "1", "--out", "out"]
    monkeypatch.setattr(
        "fvdm.evaluation.sources.Samples.read", lambda self, clips: torch.zeros(len(clips), 9, 3, 32, 32).byte()
    )
    table1.main(words)
    shown = capsys.readouterr().out
    value = json.loads((tmp_path / "out" / "ffs.json").read_text())["fvd"]
    assert "| A | 9* | 12.5 | - | - |" in shown
    assert f"| {table1.OURS} | {value:.1f}! | - | - | - |" in shown
    assert "paper A" in shown
    monkeypatch.setattr("fvdm.evaluation.comparison.measure", lambda *_: pytest.fail("measured again"))
    table1.main(words)


def test_numbers_without_a_source_are_refused(tmp_path):
    shipped = table1.read_published(table1.PUBLISHED)
    assert {"FVDM", "Latte", "AR-Diffusion", "Diffusion Forcing"} <= {entry.method for entry in shipped}
    assert all(entry.source.startswith(("first hand", "second hand")) for entry in shipped)
    keys = [(entry.method, entry.dataset, entry.frames) for entry in shipped]
    assert len(set(keys)) == len(keys)
    path = tmp_path / "published.csv"
    for row in (
        "A,ffs,16,9,styleganv,",
        "A,ffs,16,nine,styleganv,x",
        "A,ffs,,9,styleganv,x",
        "A,mars,16,9,styleganv,x",
    ):
        path.write_text(f"method,dataset,frames,fvd,protocol,source\n{row}\n")
        with pytest.raises(ValueError, match="line 2"):
            table1.read_published(path)
    with pytest.raises(ValueError, match="ffs=PATH"):
        table1.pairs(["mars=x"], "real")
