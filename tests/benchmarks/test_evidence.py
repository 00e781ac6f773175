"""benchmarks/evidence.py: scores against known ones, splits that keep apart, and every stage once, small."""

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="pip install torchmetrics")

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import measure as evidence_measure
from benchmarks.evidence import pages as evidence_text
from benchmarks.evidence.data import folders, prepare
from benchmarks.evidence.measure import ClipBench, windows
from benchmarks.evidence.plan import BUDGETS, Claim, EvidenceConfig, SetConfig, arms, claims, read_budget, trials
from benchmarks.evidence.report import draw
from benchmarks.evidence.results import Results, verdict
from benchmarks.evidence.run import Evidence
from benchmarks.experiment import Arm, Trial
from fvdm.config import parse
from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import Diffusion
from fvdm.evaluation.fvd import frechet_distance
from fvdm.evaluation.intervals import difference, interval
from fvdm.training.config import TrainConfig
from fvdm.training.engine import accumulation
from tests.evaluation.test_digits import disc

ROOT = Path(__file__).parents[2]
PLAIN = Diffusion(DiffusionConfig(learned_variance=False))


class OnGpu:
    """Features or a table on a GPU: no numbers before they are brought back."""

    def __init__(self, values):
        self.values = values

    def cpu(self):
        return self.values


def stub(tmp_path, **changed):
    """A bench of 20 videos of each split; nothing is read."""
    bench = ClipBench("ffs", SetConfig(**changed), tmp_path, lambda trial: tmp_path / trial.name, 2)
    bench.sources = {
        "train": SimpleNamespace(
            lengths=[60] * 20, names=[f"{k}" for k in range(20)], describe=lambda: {"codec": "h264"}
        ),
        "test": SimpleNamespace(lengths=[60] * 4, names=[f"{k}" for k in range(4)], read=read),
    }
    return bench


def read(clips):
    """Pictures of noise for clips."""
    shape = (len(clips), len(clips[0].frames), 3, 8, 8)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_scores_come_back_from_the_gpu_and_classes_are_hidden(tmp_path, monkeypatch):
    bench = stub(tmp_path, vae="builtin", tasks=("image-to-video",))
    bench.net = None
    shown = []

    def features(net, video, resize):
        shown.append(video.shape[0])
        return OnGpu(torch.zeros(len(video), 400))

    def table(model, diffusion, latents, seed, y=None):
        assert y.tolist() == [101, 101]
        return OnGpu(torch.zeros(2, 4, 4, 3))

    monkeypatch.setattr("benchmarks.evidence.measure.fvd.features", features)
    monkeypatch.setattr(evidence_measure, "neighbour_table", table)
    model = SimpleNamespace(null=lambda count: torch.full((count,), 101))
    vae = SimpleNamespace(encode_mean=lambda pictures: torch.zeros(len(pictures), 16, 4, 1, 1))
    monkeypatch.setattr(bench, "trained", lambda trial: SimpleNamespace(model=model, vae=vae, diffusion=PLAIN))
    arm = Arm("ffs", "XL/2", 0.2, 0)
    assert bench.measure(Trial("ffs", arm, "validation", "loss", "", 4), range(2))["table"].shape == (2, 4, 4, 3)
    assert bench.measure(Trial("ffs", None, "generate", "test", "", 4), range(2))["features"].shape == (2, 400)
    assert shown == [2]


def test_each_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for worker in range(6):
        monkeypatch.setenv("LOCAL_RANK", str(worker))
        evidence.main(["--budget", "smoke", "--out", str(tmp_path), "--stages", "worker"])
    assert [device.index for device in taken] == [0, 1, 2, 3, 0, 1]


@pytest.mark.filterwarnings("ignore:the Fréchet distance")
def test_a_published_protocol_keeps_all_clips_and_says_where_it_departs(tmp_path):
    bench = stub(
        tmp_path, protocol="styleganv", reference="train", stride=3, clips=30, seeds=(0,), p=(0.0, 0.2), size=256
    )
    arm = Arm("ffs", bench.config.model, 0.2, 0)
    sampled = Trial("ffs", arm, "generate", "sampled", "ddim:50", 30)
    real = Trial("ffs", None, "generate", "train", "", 30)
    assert {step for clip in bench.clips(real) for step in np.diff(clip.frames)} == {1}, "the protocol's stride"
    truth = bench.clips(Trial("ffs", arm, "image-to-video", "held", "ddim:50", 30))
    assert {step for clip in truth for step in np.diff(clip.frames)} == {3}, "the training run's stride"
    assert len(bench.clips(real)) == 20
    results = Results(bench)
    rng = np.random.default_rng(0)
    results.tables = {
        real.name: {"features": rng.normal(size=(20, 5)), "seconds": np.ones(1)},
        sampled.name: {"features": rng.normal(size=(30, 5)) + 1, "seconds": np.ones(1)},
    }
    row = results.row([sampled], ["fvd"])
    assert (row["clips"], row["real"]) == (30, 20)
    a, b = (results.tables[trial.name]["features"] for trial in (real, sampled))
    assert row["fvd"][0] == frechet_distance(a, b)
    assert row["fvd"][1] < row["fvd"][0] < row["fvd"][2]
    card = bench.card()
    assert card["departs from it"] == [
        "30 generated clips, not 2048",
        "20 real clips, as many as there are videos, not 2048",
    ]
    assert results.clips([sampled]) == 30, "held-out videos are four, and do not count here"


def test_a_task_of_other_clips_is_compared_with_its_own_truth(tmp_path):
    bench = stub(tmp_path, protocol="styleganv", reference="train", tasks=("image-to-video",), seeds=(0,))
    trial = Trial("ffs", Arm("ffs", bench.config.model, 0.2, 0), "image-to-video", "held", "ddim:50", 64)
    results = Results(bench)
    fake, truth = np.ones((4, 5)), np.zeros((4, 5))
    test = {"features": np.full((4, 5), 9.0)}
    results.tables = {trial.name: {"features": fake, "truth_features": truth}, "ffs/generate/test": test}
    assert results.number([trial], "distance")[0] == pytest.approx(5**0.5)


def test_intervals_hold_the_mean_and_pairs_are_narrower():
    rows = np.random.default_rng(0).normal(3, 1, 100)
    other = rows + 0.5 + 0.01 * np.random.default_rng(1).normal(size=100)
    value, low, high = interval(lambda k: float(rows[k.clips].mean()), 100, 200)
    assert low < value < high
    assert high - low == pytest.approx(4 * rows.std() / 10, rel=0.2)
    pair = difference(lambda k: float(other[k.clips].mean()), lambda k: float(rows[k.clips].mean()))
    paired = interval(pair, 100, 200)
    assert paired[2] - paired[1] < 0.02


@pytest.mark.parametrize(
    ("found", "seeds", "same", "said"),
    [
        ([5.0, 2.0, 8.0], [4.0, 6.0], False, "reproduced"),
        ([5.0, 2.0, 8.0], [-1.0, 11.0], False, "not reproduced: no"),
        ([5.0, -1.0, 8.0], [4.0, 6.0], False, "not reproduced: no"),
        ([-5.0, -8.0, -1.0], [-4.0, -6.0], False, "not reproduced: the other way"),
        ([5.0, 2.0, 8.0], [5.0], True, "reproduced"),
        ([25.0, 14.0, 38.0], [25.0], True, "not reproduced: they differ by more"),
        ([50.0, -5.0, 400.0], [50.0], True, "not reproduced: these clips cannot tell"),
        ([1.0, -60.0, 60.0], [1.0], True, "not reproduced: these clips cannot tell"),
        ([1.0, -5.0, 5.0], [-20.0, 22.0], True, "not reproduced: these clips cannot tell"),
    ],
)
def test_a_verdict_wants_an_interval_and_agreeing_seeds(found, seeds, same, said):
    measures = {"fvd": {"difference": found, "by_seed": seeds, "better": 100.0, "worse": 100.0 + found[0]}}
    claim = Claim("", "", [], [], ("fvd",), same)
    assert verdict(claim, measures).startswith(said)
    assert verdict(claim, measures, seeds=2).endswith(" (one seed)") == (len(seeds) == 1)
    for still, limited in ((90.0, True), (101.0, False)):
        measures["fvd"]["still"] = still
        assert ("a frozen frame beats both" in verdict(claim, measures)) == limited
    assert verdict(Claim("", "", [], [], ("fvd",), same), {}) == "not run yet"


def test_every_budget_reads_and_its_names_are_its_own():
    for name in BUDGETS:
        for data, config in read_budget(name).sets.items():
            names = [trial.name for trial in trials(data, config)]
            assert len(set(names)) == len(names)
            assert len({arm.name for arm in arms(data, config)}) == len(arms(data, config))
            assert {arm.seed for arm in arms(data, config)} == set(config.seeds)
            for claim in claims(data, config):
                assert claim.better, claim.name
                assert claim.worse, claim.name
                assert {trial.name for trial in (*claim.better, *claim.worse)} <= set(names)
    paper = read_budget("paper").sets
    overnight = read_budget("cpu-overnight").sets["digits"]
    found = arms("digits", overnight)
    assert {(arm.p, arm.rule) for arm in found if arm.model == overnight.model} == {
        *((p, "ptss") for p in (0.0, 0.2, 0.5, 1.0)),
        (1.0, "chunk"),
        (1.0, "nondecreasing"),
    }
    (chunk,) = (arm for arm in found if arm.rule == "chunk")
    assert chunk.name == f"digits_{overnight.model.replace('/', '-')}_p1_chunk_s0"
    assert chunk.settings == {"model": overnight.model, "p": 1.0, "seed": 0, "timesteps.rule": "chunk"}
    seeds = {arm.p: sum(same.p == arm.p for same in found if same.rule == "ptss") for arm in found}
    assert seeds == {0.0: 3, 0.2: 4, 0.5: 1, 1.0: 1}, "three seeds where it is decided; p = 0.2 has the other size too"
    methods = {(trial.task, trial.method) for trial in trials("digits", overnight)}
    assert {("interpolate", "straight"), ("long", "straight"), ("image-to-video", "frozen")} <= methods
    assert ("image-to-video", "straight") not in methods
    assert set(paper) == {"ffs", "sky", "ucf101", "taichi"}
    assert all(config.model == "XL/2" and config.clips == 2048 for config in paper.values())


@pytest.mark.parametrize("name", BUDGETS)
def test_every_training_of_a_budget_fits_one_to_eight_gpus(name, tmp_path):
    budget = read_budget(name)
    evidence_of_budget = Evidence(name, budget, EvidenceConfig(out=str(tmp_path)))
    for data, config in budget.sets.items():
        words = evidence_of_budget.run(arms(data, config)[0]).command
        run = parse(TrainConfig, words[words.index("--config") :])
        for ranks in (1, 2, 4, 8) if name == "paper" else (1,):
            accumulation(run.data.batch_size, run.engine.micro_batch, ranks)
        if name == "paper":
            same = parse(TrainConfig, ["--config", str(ROOT / "configs" / f"{data}_xl.yaml")])
            assert (run.data.batch_size, run.steps, run.engine) == (same.data.batch_size, same.steps, same.engine)
            assert run.conditional == same.conditional


def test_held_out_videos_are_never_trained_on(tmp_path, monkeypatch):
    videos = tmp_path / "videos" / "deep"
    videos.mkdir(parents=True)
    for k in range(10):
        (videos / f"{k}.mp4").write_bytes(b"\0\0\0\0ftyp")
    monkeypatch.setattr("benchmarks.evidence.data.encode", lambda *_, **__: None)
    config = SetConfig(hold_out=5)
    prepare("x", config, tmp_path / "out", tmp_path / "videos", "")
    split = {s: {p.resolve() for p in (tmp_path / "out" / s).rglob("*.mp4")} for s in ("train", "test")}
    assert len(split["train"]) == 8
    assert len(split["test"]) == 2
    assert not split["train"] & split["test"]
    prepare("x", config, tmp_path / "out", None, "")
    (videos / "new.mp4").write_bytes(b"\0\0\0\0ftyp")
    with pytest.raises(ValueError, match="held-out clips would mix"):
        prepare("x", config, tmp_path / "out", tmp_path / "videos", "")
    with pytest.raises(ValueError, match="needs real videos: give a folder"):
        prepare("x", config, tmp_path / "other", None, "")
    assert folders([f"x={videos}"], {"x": config}) == {"x": videos}
    with pytest.raises(ValueError, match="NAME=DIR"):
        folders([f"y={videos}"], {"x": config})


def test_windows_are_spread_over_every_video():
    found = windows(SetConfig(stride=2, windows=2), [40, 10, 40], 16, 10)
    assert [(clip.video, clip.frames[0]) for clip in found] == [(0, 0), (0, 9), (2, 0), (2, 9)]
    with pytest.raises(ValueError, match="videos have 31 frames"):
        windows(SetConfig(stride=2), [40, 10], 16, 10)


def test_the_pages_hold_the_tables_of_their_numbers():
    results = json.loads((ROOT / "docs" / "evidence" / "results.json").read_text())
    pictures = {path.stem: f"evidence/{path.name}" for path in sorted((ROOT / "docs" / "evidence").glob("*.png"))}
    parts = {
        evidence_text.TABLES: evidence_text.render(results, pictures),
        evidence_text.SUMMARY: evidence_text.summary(results),
    }
    pages = [ROOT / "docs" / name for name in ("evidence.md", "evidence_tables.md")]
    for page in pages:
        text = page.read_text()
        assert evidence_text.replace_parts(text, parts) == text, f"run benchmarks/evidence.py with --docs {page}"
    shown = "".join(page.read_text() for page in pages)
    assert all(f"({link})" in shown for link in pictures.values()), "a picture that nobody sees"
    with pytest.raises(ValueError, match="no place for tables"):
        evidence_text.replace_parts("# Page", parts)


def test_held_out_losses_are_a_table_with_a_fit_and_a_figure(tmp_path):
    losses = [[step, 0.1 + step**-0.5, 0.1, 0.2] for step in range(100, 1100, 100)]
    runs = {
        "a": {"steps": 1000, "seconds": 1.0, "flops": 1e13, "held_out": [[0, 1.0, 1.0, 1.0], *losses]},
        "b": {"steps": "not run yet", "seconds": None, "flops": None, "held_out": []},
        "c": {"steps": 3, "seconds": 1.0},  # Of a version without it.
    }
    shown = evidence_text.held_out(runs)
    assert shown.count("\n") == 3
    row = [cell.strip() for cell in shown.splitlines()[2].split("|")[1:-1]]
    assert row[:5] == ["a", "1000", "10.0", "1.000", f"{losses[-1][1]:.3f}"]
    assert float(row[7]) == pytest.approx(0.1, abs=0.02), "the floor"
    assert float(row[8]) == pytest.approx(0.5, abs=0.05), "the exponent"
    assert float(row[9]) == pytest.approx(0.1 + 10000**-0.5, abs=0.005)
    found = draw({"sets": {}, "training_runs": runs}, tmp_path)
    assert set(found) == {"compute"}
    assert found["compute"].exists()


@pytest.mark.slow
def test_every_stage_is_one_command_that_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("benchmarks.evidence.results.MANY", 50)
    np.savez(tmp_path / "digits.npz", images=(disc(20) * 255).byte().numpy(), labels=np.arange(20) // 2)
    (tmp_path / "page.md").write_text("# Page\n\n<!-- tables: begin -->\n<!-- tables: end -->\n\nEnd.\n")
    words = ["--budget", "smoke", "--out", "out", "--digits", "digits.npz", "--docs", "page.md"]
    evidence.main(words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["sets"]) == {"digits", "clips"}
    assert all(results["runs"].values()), "every number has a run"
    verdicts = [row["verdict"] for entry in results["sets"].values() for row in entry["comparisons"]]
    assert all(verdict.startswith(("reproduced", "not reproduced")) for verdict in verdicts)
    digits = results["sets"]["digits"]["tasks"]
    assert {row["method"] for row in digits["interpolate"]} == {"replacement", "held", "frozen", "straight", "vae"}
    assert all(0 <= row["named"][0] <= 1 for rows in digits.values() for row in rows), "each digit is named"
    trained = results["training_runs"]
    assert {"digits_T-4_p0_s0", "digits_T-4_p0.2_s0"} < set(trained)
    assert [step for step, *_ in trained["digits_T-4_p0_s0"]["held_out"]] == [0, 1, 2]
    page = (tmp_path / "page.md").read_text()
    assert "## Held-out loss" in page
    assert "(evidence/compute.png)" in page
    assert page.endswith("End.\n")
    assert results["parent"] in page
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "measured").rglob("part-*.npz")}
    next(iter(kept)).unlink()
    capfd.readouterr()
    evidence.main([*words, "--stages", "measure", "report"])
    shown = capfd.readouterr().out
    assert "measurements: 1 to do" in shown
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"] == results["runs"]

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("evidence").experiment_id], max_results=1000)
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == results["parent"]]
    assert {run.info.run_id for run in below} == set(results["runs"].values())
    by_name = {run.info.run_name: run for run in below}
    for entry in results["sets"].values():
        for row in (*entry["generation"], *(row for rows in entry["tasks"].values() for row in rows)):
            shown = by_name[row["jobs"][0]].data
            task = shown.params["task"]
            for measure in ("fvd", "kvd", "motion", "psnr", "residual"):
                if measure in row:
                    ends = ("", "_low_95", "_high_95")
                    assert [shown.metrics[f"{task}/{measure}{end}"] for end in ends] == row[measure]
            assert {"--videos", "--digits", "--out", "--only"} <= set(shlex.split(shown.tags["command"]))
            assert by_name[row["jobs"][0]].inputs.dataset_inputs
    files = {file.path for file in client.list_artifacts(results["parent"], "videos")}
    assert "videos/digits_long.mp4" in files


def test_misuse_ends_with_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        evidence.main(["--budget", "smoke", "--out", str(tmp_path), "--videos", "/nowhere"])
    assert stopped.value.code == 2
    assert "is not a folder" in capsys.readouterr().err
