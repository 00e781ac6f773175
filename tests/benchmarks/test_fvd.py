"""benchmarks/fvd.py as a user runs it: the same digits again, on any number of ranks, and what it leaves behind."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from benchmarks import fvd as benchmark
from benchmarks.reporting import BenchmarkReport, Data, send
from fvdm.distributed import Ranks, free_port
from fvdm.evaluation.comparison import numbers
from fvdm.evaluation.config import SampleConfig
from fvdm.evaluation.fvd import features, load_i3d
from fvdm.evaluation.measure import clip_features, freeze
from fvdm.evaluation.protocols import Clip
from fvdm.evaluation.sources import Files, Samples, describe_rates
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.tracker import Tracker, run_of
from tests.data_fixtures import cut, write_frames, write_video
from tests.generation.test_pipeline import make_run

ROOT = Path(__file__).parents[2]
few = pytest.mark.filterwarnings("ignore:the Fréchet distance")
QUICK = ["--frames", "9", "--size", "32", "--bootstrap", "4", "--chunk", "2"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two folders of short real clips: files, and frame folders."""
    root = tmp_path_factory.mktemp("clips")
    for k in range(4):
        write_video(root / "real" / f"{k}.mp4", cut(k, 12)[:, :64, :64])
        write_frames(root / "fake" / str(k), cut(k + 9, 9)[:, 40:104, 40:104], [f"{i}.png" for i in range(9)])
    return root


def words(clips, out, *more):
    return ["--real", str(clips / "real"), "--fake", str(clips / "fake"), "--out", str(out), *QUICK, *more]


def ran(folder, clips, monkeypatch, *more):
    """The result of a run inside this process."""
    monkeypatch.chdir(folder)
    benchmark.main(words(clips, folder / "out", *more))
    return json.loads((folder / "out" / "fvd.json").read_text())


def torchrun(world_size, arguments, folder):
    """Run on some ranks; what each printed."""
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "fvd.py"), *arguments],
            env=os.environ | {name: str(value) for name, value in (shared | {"RANK": k, "LOCAL_RANK": k}).items()},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(world_size)
    ]
    return [(*rank.communicate(timeout=300), rank.returncode) for rank in ranks]


def test_the_same_command_gives_the_same_digits_and_a_card(clips, tmp_path, monkeypatch, capsys):
    (tmp_path / "again").mkdir()
    torch.set_num_threads(1)
    first, again = (ran(folder, clips, monkeypatch) for folder in (tmp_path, tmp_path / "again"))
    assert first == again
    shown = capsys.readouterr().out
    for entry in (
        "styleganv",
        "seed",
        "second resize",
        "short",
        "sha256 af5c50f0",
        "stride",
        "h264",
        "frame folders of .png",
        "n - 0",
        "note:",
    ):
        assert entry in shown
    assert first["clips"] == first["clips_real"] == 4
    assert "2048" in first["card"]["departs from it"]
    assert first["card"]["frames/s"] == "real 25; fake unknown: images have none"
    assert 0 <= first["low"] <= first["fvd"] <= first["high"]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("benchmarks").experiment_id])
    assert not run.data.metrics, "a number alone would be a chart of one bar"
    assert float(run.data.params["fvd/styleganv_9f"]) == pytest.approx(first["fvd"], rel=1e-5)
    assert {"kvd/styleganv_9f", "fvd/styleganv_9f_low_95", "fvd_floor/styleganv_9f_real_against_real"} <= set(
        run.data.params
    )
    assert "| fvd/styleganv_9f |" in run.data.tags["mlflow.note.content"]
    assert {"host", "gpu", "git_commit", "protocol", "config"} <= set(run.data.tags)
    assert run.data.params["detector"].startswith("I3D")
    assert {entry.dataset.name: entry.tags[0].value for entry in run.inputs.dataset_inputs} == {
        "real": "real",
        "fake": "fake",
    }
    assert {file.path for file in client.list_artifacts(run.info.run_id, "fvd")} == {"fvd/fvd.json", "fvd/card.txt"}


@pytest.mark.parametrize(
    ("rates", "stride", "text"),
    [
        ([25.0, 25.0], 1, "25"),
        ([25.0, 25.0], 3, "8.333, every 3rd frame of 25"),
        ([24.0, 30.0], 2, "12 to 15, every 2nd frame of 24 to 30"),
        ([25.0, None], 1, "25; unknown for 1 of 2"),
        ([None], 4, "unknown: images have none"),
    ],
)
def test_the_card_says_at_which_frame_rates_the_clips_run(rates, stride, text):
    assert describe_rates(rates, stride) == text


def test_the_frame_rate_of_a_checkpoint_is_that_of_its_training_data(tmp_path):
    source = Samples(str(make_run(tmp_path)), SampleConfig(steps=1), frames=8, num=2)
    source.trained = dataclasses.replace(source.trained, stride=3)
    assert source.frame_rate(1) == "that of its training data, every 3rd frame"


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_digits(clips, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    alone = ran(tmp_path, clips, monkeypatch)
    done = torchrun(4, words(clips, tmp_path / "4"), tmp_path)
    assert [code for *_, code in done] == [0] * 4, done
    assert json.loads((tmp_path / "4" / "fvd.json").read_text()) == alone
    (clips / "real" / "broken.mp4").write_bytes((clips / "real" / "0.mp4").read_bytes()[:-700])
    done = torchrun(2, words(clips, tmp_path / "broken"), tmp_path)
    (clips / "real" / "broken.mp4").unlink()
    assert [code for *_, code in done] == [2, 2]
    assert all("broken.mp4" in error for _, error, _ in done)


@pytest.mark.slow
def test_so_does_a_checkpoint_that_is_sampled(clips, tmp_path):
    """Seven videos in chunks of two, so that ranks have shares of their own size."""
    run = make_run(tmp_path / "run")
    shared = ["--real", str(clips / "real"), "--fake", str(run), *QUICK, "--clips", "7", "--steps", "2"]
    found = {}
    for world_size in (1, 3):
        out = tmp_path / str(world_size)
        done = torchrun(world_size, [*shared, "--out", str(out), "--run", str(out)], tmp_path)
        assert [code for *_, code in done] == [0] * world_size, done
        found[world_size] = json.loads((out / "fvd.json").read_text())
    assert found[1] == found[3]
    assert found[1]["clips"] == 7
    assert found[1]["card"]["fake steps"] == "2"


def test_a_checkpoint_is_sampled_in_any_order_of_chunks(tmp_path):
    run = make_run(tmp_path)
    source = Samples(str(run), SampleConfig(steps=2), frames=8, num=6, seed=3)
    together = source.read([Clip(k, tuple(range(8))) for k in range(6)])
    later = source.read([Clip(k, tuple(range(8))) for k in (4, 5)])
    assert (together[4:].int() - later.int()).abs().max() <= 1
    assert source.task == "generate"
    long = Samples(str(run), SampleConfig(steps=1), frames=20, num=2)
    assert long.task == "long"
    assert long.read([Clip(0, tuple(range(20)))]).shape == (1, 20, 3, 32, 32)
    card = long.describe()
    assert {"checkpoint", "sampler", "steps", "guidance", "precision", "VAE"} <= set(card)
    with pytest.raises(ValueError, match="not real ones"):
        source.read([Clip(k, (0,)) for k in (3, 1)])


def test_a_result_finds_the_run_of_its_model_or_gets_its_own(tmp_path, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    owner = Tracker(tmp_path / "run", TrackingConfig(system_metrics=False), "model")
    owner.close()
    assert run_of(tmp_path / "run") == run_of(tmp_path / "run" / "checkpoints" / "step-1") == owner.run_id
    found = BenchmarkReport("fvd", "fvd", [(7, {"fvd/x": 1.5})], data=[Data("clips", "/clips", "real", [1, 2])])
    assert send(found, tmp_path, run_id=owner.run_id) == owner.run_id
    assert run_of(tmp_path) == ""
    own = send(found, tmp_path, run_id="0123456789abcdef0123456789abcdef")
    assert own not in ("", owner.run_id)
    assert "a run of its own" in caplog.text
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for run_id in (own, owner.run_id):
        assert [(m.step, m.value) for m in client.get_metric_history(run_id, "fvd/x")] == [(7, 1.5)]
        assert client.get_run(run_id).inputs.dataset_inputs[0].dataset.name == "clips"


def test_features_are_those_of_the_clips(clips):
    net = load_i3d()
    source = Files(str(clips / "fake"), 32)
    taken = [Clip(k, tuple(range(9))) for k in (0, 2, 3)]
    found = clip_features(net, source, taken, Ranks(), chunk=2)
    expected = torch.cat([features(net, source.read([clip])) for clip in taken]).double()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    still = clip_features(net, source, taken[:1], Ranks(), still=True)
    np.testing.assert_allclose(still, features(net, freeze(source.read(taken[:1]))).double(), atol=1e-6)
    assert np.abs(still[0] - found[0]).max() > 0.01


@pytest.mark.parametrize("n", [450, 900])
@pytest.mark.filterwarnings("ignore:the Fréchet distance")
def test_numbers_equal_an_independent_computation(n):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(n, 40)) @ rng.normal(size=(40, 40)), rng.normal(size=(n, 40)) + 0.2
    result = numbers([(real, fake), (fake, fake)], ddof=1, draws=2)
    c_a, c_b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum()
    expected += np.trace(c_a + c_b - 2 * scipy.linalg.sqrtm(c_a @ c_b).real)
    assert result["values"][0] == pytest.approx(expected, rel=1e-6)
    assert result["values"][1] == pytest.approx(0, abs=1e-6)
    assert result["fvd"] == pytest.approx(expected / 2, rel=1e-6)
    assert result["std"] == pytest.approx(expected / 2**0.5, rel=1e-6)


@few
@pytest.mark.parametrize(("every", "lines"), [(0.0, ["real: 4 of 7 clips", "real: 7 of 7 clips"]), (60.0, [])])
def test_a_log_says_now_and_then_how_far_it_is(monkeypatch, capsys, every, lines):
    from fvdm.distributed import Ranks
    from fvdm.evaluation import comparison

    monkeypatch.setattr(comparison, "LOG_EVERY", every)
    done = comparison._progress("real", 7, 4, Ranks())
    done(0)
    done(1)
    assert capsys.readouterr().err.splitlines() == lines


def test_what_stands_beside_the_mean_of_draws_is_of_all_of_them():
    """The first draw is far off: an interval, an extrapolation or a floor of it alone would miss the mean."""
    rng = np.random.default_rng(0)
    near = [(rng.normal(size=(40, 6)), rng.normal(size=(40, 6)) + 1) for _ in range(3)]
    far = (rng.normal(size=(40, 6)), rng.normal(size=(40, 6)) + 4)
    result = numbers([far, *near], ddof=1, draws=50)
    assert result["low"] < result["fvd"] < result["high"]
    one = numbers([far], ddof=1, draws=50)
    assert one["low"] > result["fvd"]
    alone = [numbers([pair], ddof=1, draws=0) for pair in (far, *near)]
    assert result["infinity"] == pytest.approx(np.mean([each["infinity"] for each in alone]))
    for name, value in result["floor"].items():
        assert value == pytest.approx(np.mean([each["floor"][name] for each in alone]))


def test_few_clips_give_finite_numbers_and_a_warning():
    rng = np.random.default_rng(0)
    result = numbers([(rng.normal(size=(64, 400)), rng.normal(size=(64, 400)))], ddof=0, draws=3)
    assert "of 64 against 64 clips is not comparable" in result["warning"]
    assert all(np.isfinite(result[key]) for key in ("fvd", "kvd", "low", "high", "infinity"))
    assert min(result["fvd"], result["low"]) >= 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--protocol", "fvd"], "choose one of styleganv"),
        (["--frames", "8"], "--frames is 8: the I3D halves time three times"),
        (["--frames", "64"], "0 of 4 videos have 64 frames"),
        (["--real-pattern", "x*"], "no videos named x*"),
        (["--fake", "/nowhere"], "'/nowhere' is not a folder"),
        (["--clips", "1"], "at least 2 clips"),
    ],
)
def test_misuse_ends_with_a_sentence(clips, tmp_path, refusal, more, sentence):
    assert sentence in refusal(benchmark.main, words(clips, tmp_path, *more))
