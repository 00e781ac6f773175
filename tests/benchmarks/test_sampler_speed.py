"""benchmarks/sampler_speed.py: every solver is measured, against the truth it should be measured against."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import sampler_speed, solver_costs
from benchmarks.models import open_model
from benchmarks.plots import pareto_front
from benchmarks.sampler_config import SamplerSpeedConfig
from fvdm.config import parse
from fvdm.diffusion.solvers import SOLVERS
from tests.data_fixtures import cut, write_video
from tests.generation.test_pipeline import make_run


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_the_front_is_what_nothing_beats(points):
    front = pareto_front(points)

    def beaten(p):
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)

    assert {points[k] for k in front} == {p for p in points if not beaten(p)}
    assert [points[k] for k in front] == sorted(points[k] for k in front)


def test_smoke_measures_every_solver(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    sampler_speed.main(["--smoke", "--tasks", "generate", "long", "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["solver"] for row in rows} == set(SOLVERS)
    plain = [row for row in rows if row["setting"].startswith("generate")]
    assert all(row["evaluations"] >= row["steps"] for row in plain)
    assert [row["evaluations"] for row in plain if row["solver"] == "ddim"] == [3, 6, 12]
    long = [row for row in rows if row["setting"].startswith("long")]
    # 9 frames given half, and 18 wanted: three windows, each sampled on its own.
    assert [row["evaluations"] for row in long if row["solver"] == "ddim"] == [9, 18, 36]
    for solver in set(SOLVERS) - set(solver_costs.STOCHASTIC):
        assert all(row["error"] > 0 for row in plain if row["solver"] == solver)
    errors = [row["error"] for row in plain if row["solver"] == "ddim"]
    assert errors == sorted(errors, reverse=True), "more steps come nearer"
    assert errors[-1] < 0.2
    assert all(row["error"] is None for row in rows if row["solver"] in solver_costs.STOCHASTIC)
    assert all(row["seconds"] > 0 and row["memory"] > 0 for row in rows)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("benchmarks").experiment_id])
    key = "generate.batch_2.fp32.auto/error_ddim"
    assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == [3, 6, 12]
    files = {file.path for file in client.list_artifacts(run.info.run_id, "sampler_speed")}
    assert "sampler_speed/generate.batch_2.fp32.auto.png" in files


def test_a_checkpoint_is_measured_against_real_clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        write_video(tmp_path / "real" / f"{k}.mp4", cut(k, 20))
    words = (
        "--checkpoint random:T/4 --frames 9 --tasks image-to-video --batch-sizes 2 --clips 2 --precisions bf16 "
        "--attention math --solvers ddim:2 ddim:40 --repeats 1 --reference-steps 40"
    )
    config = parse(SamplerSpeedConfig, [*words.split(), "--real", str(tmp_path / "real")])
    rows = solver_costs.run_all(config)
    assert all(row.fvd is not None and row.fvd > 0 and row.quality == row.fvd for row in rows)
    assert 0 < rows[1].error < 0.1 < rows[0].error, "in bf16 near the float32 result, not on it"


def test_a_run_is_opened_with_any_backend(tmp_path):
    run = make_run(tmp_path)
    models = [open_model(str(run), "fp32", backend).model for backend in ("math", "sdpa")]
    assert [model.config.attention for model in models] == ["math", "sdpa"]
    x, t = torch.randn(1, 8, *[models[0].config.channels, *[models[0].config.size] * 2]), torch.full((1, 8), 500)
    torch.testing.assert_close(models[0](x, t), models[1](x, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--solvers", "euler:5"], "words such as ddim:50; solvers are ddim"),
        (["--solvers", "ddim"], "words such as ddim:50"),
        (["--attention", "fast"], "Got value: fast"),
        (["--checkpoint", "random:Q/2"], "model 'Q/2' is unknown"),
        (["--checkpoint", "/nowhere"], "no complete checkpoint"),
        (["--tasks", "dance"], "task 'dance' is unknown"),
    ],
)
def test_misuse_ends_with_a_sentence(tmp_path, refusal, words, sentence):
    assert sentence in refusal(sampler_speed.main, ["--smoke", "--out", str(tmp_path), *words])
