"""benchmarks/zero_shot.py: scores against known ones, baselines that do what they are called, and the whole once."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="pip install torchmetrics")

from benchmarks import zero_shot
from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import Diffusion
from fvdm.evaluation.replacement import replacement
from fvdm.evaluation.scores import drawn, feature_distance, psnr, ssim
from tests.data_fixtures import cut

PLAIN = Diffusion(DiffusionConfig(learned_variance=False))


def video(number: int = 0) -> torch.Tensor:
    return torch.from_numpy(cut(number, 4)[:, :48, :56].copy()).permute(0, 3, 1, 2)[None]  # (1 4 3 48 56)


def test_psnr_is_its_formula():
    a = video()
    b = (a.int() + torch.randint(-9, 10, a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    error = np.square(a.double().numpy() - b.double().numpy()).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(255**2 / error), rtol=1e-6)
    assert psnr(a, a).tolist() == [[100.0] * 4]


def test_ssim_falls_with_damage_and_is_one_for_equals():
    a = video()
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    scores = [float(ssim(a, (a + level * noise).clamp(0, 255).byte()).mean()) for level in (0, 5, 20, 80)]
    assert scores[0] == pytest.approx(1)
    assert scores == sorted(scores, reverse=True)
    assert ssim(a, a).shape == (1, 4)


def test_scores_want_equal_shapes():
    for score in (psnr, ssim):
        with pytest.raises(ValueError, match="give equal shapes"):
            score(video(), video()[:, :2])
    assert feature_distance(torch.zeros(2, 400), torch.ones(2, 400)).tolist() == [20.0, 20.0]
    assert drawn(5, (0, 4)) == [1, 2, 3]


@pytest.mark.parametrize("repeats", [1, 3])
def test_replacement_shows_the_given_frames_at_the_others_timestep(repeats):
    clip = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    seen = []

    def knowing(x, t, y):
        """The noise estimate of a model that knows the clip."""
        assert (t == t[:, :1]).all(), "a scalar timestep"
        alpha, sigma = (level.float() for level in PLAIN.levels(t))
        seen.append((int(t[0, 0]), float(((x - alpha * clip) / sigma)[:, [0, 5]].std())))
        return (x - alpha * clip) / sigma

    made = replacement(knowing, PLAIN, clip, (0, 5), [3, 4], steps=5, repeats=repeats)
    assert torch.equal(made[:, [0, 5]], clip[:, [0, 5]])
    torch.testing.assert_close(made, clip, atol=1e-3, rtol=0)
    assert len(seen) == 5 * repeats
    assert all(0.8 < noise < 1.2 for _, noise in seen), "given frames carry noise of the step's level"
    alone = replacement(
        lambda x, t, y: knowing_one(x, t, clip[1:]), PLAIN, clip[1:], (0, 5), [4], steps=5, repeats=repeats
    )
    torch.testing.assert_close(alone, made[1:], atol=1e-3, rtol=0)


def knowing_one(x, t, clip):
    alpha, sigma = (level.float() for level in PLAIN.levels(t))
    return (x - alpha * clip) / sigma


def test_replacement_goes_on_window_by_window():
    clip = torch.randn(1, 6, 3, 4, 4)
    made = replacement(lambda x, t, y: x, PLAIN, clip, range(3), [0], steps=2, length=14)
    assert made.shape == (1, 14, 3, 4, 4)
    assert torch.equal(made[:, :3], clip[:, :3])


def test_smoke_compares_every_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    zero_shot.main(["--smoke", "--no-i3d", "--out", "out"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == set(zero_shot.TASKS)
    for task, entry in results.items():
        assert set(entry) == {"held", "replacement", "repaint", "frozen", "vae", "given"}
        frames = 14 if task == "long" else 9
        assert sorted(entry["given"]["frames"] + entry["given"]["drawn"]) == list(range(frames))
        assert len(entry["held"]["psnr_by_frame"]) == len(entry["given"]["drawn"])
        assert entry["vae"]["psnr"] > entry["held"]["psnr"], "the VAE's is the best that latents allow"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("benchmarks").experiment_id])
    assert {"long/psnr_held", "long/psnr_replacement", "interpolate/ssim_repaint"} <= set(run.data.params)
    assert all(len(client.get_metric_history(run.info.run_id, name)) > 1 for name in run.data.metrics)
    assert len(client.get_metric_history(run.info.run_id, "long/psnr_by_frame_held")) == 14 - 4
    files = {file.path for file in client.list_artifacts(run.info.run_id, "zero_shot")}
    assert {"zero_shot/psnr.png", "zero_shot/long_psnr.png", "zero_shot/interpolate.png"} <= files
    assert run.inputs.dataset_inputs[0].tags[0].value == "truth"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give --checkpoint and --real"),
        (["--checkpoint", "random:T/2", "--real", "x", "--tasks", "generate"], "no ground truth"),
        (["--checkpoint", "random:T/2", "--real", "/nowhere"], "is not a folder"),
    ],
)
def test_misuse_ends_with_a_sentence(tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        zero_shot.main([*words, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
