"""Training on real DeepSpeed ranks over gloo: what resumes, what is equal to what, and how runs end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fvdm import checkpoint as ckpt
from fvdm import config as settings
from fvdm.continuity import changes, identity
from fvdm.data import batches
from fvdm.diffusion import Diffusion
from fvdm.distributed import Ranks, free_port
from fvdm.engine import accumulation
from fvdm.model import VideoDiT
from fvdm.run import TrainConfig, check, model_config
from fvdm.shards import LatentShards
from fvdm.train import Draw
from tests.data_fixtures import make_shards

ROOT = Path(__file__).parent.parent
WORDS = ["--model", "T/2", "--data.frames", "6", "--data.interval", "1", "--data.batch_size", "4"]
WORDS += ["--data.workers", "0", "--engine.lr", "1e-3", "--engine.clip_from", "0", "--ema_decay", "0.9"]
WORDS += ["--engine.precision", "fp32", "--engine.timeout", "60", "--log_every", "1", "--stop_every", "1"]
WORDS += ["--checkpoint.every", "1000", "--previews.every", "0", "--tracking.system_metrics", "false"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("latents"), [12, 9, 10, 30, 8, 11, 6], labels=True)


def words(latents, folder, name, *more):
    base = ["--name", name, "--data.path", str(latents), "--runs", str(folder / "runs")]
    return [*base, "--tracking.uri", f"sqlite:///{folder}/mlflow.db", *WORDS, *map(str, more)]


def environment(rank, world_size, port):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | {name: str(value) for name, value in (ranks | fixed).items()}


def start(world_size, arguments, folder, **more):
    port = free_port()
    command = [sys.executable, "-m", "fvdm.train", *arguments]
    return [
        subprocess.Popen(
            command,
            env=environment(rank, world_size, port),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **more,
        )
        for rank in range(world_size)
    ]


def train(world_size, arguments, folder, codes=(0,)):
    processes = start(world_size, arguments, folder)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        # Some gloo processes abort at exit, after everything is done.
        assert process.returncode in (*codes, -signal.SIGABRT), output
    return outputs


def state(folder, name):
    newest = ckpt.newest(folder / "runs" / name / "checkpoints")
    total = sum(torch.Size(shape).numel() for shape in ckpt.read_state(newest)["names"].values())
    return ckpt.read_state(newest), {s: ckpt.read_slice(newest, s, range(total)) for s in ckpt.SLICES}


def losses(folder, name):
    events = [json.loads(line) for line in (folder / "runs" / name / "events.jsonl").read_text().splitlines()]
    return {e["step"]: e["metrics"]["loss/mean"] for e in events if "loss/mean" in e.get("metrics", {})}


@pytest.fixture(scope="module")
def undisturbed(latents, tmp_path_factory):
    """Eight steps on two ranks, in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, words(latents, folder, "run", "--steps", 8), folder)
    return folder


def plain(config, steps):
    """The same training in plain PyTorch, on one process: losses and weights."""
    shards = LatentShards(config.data.path)
    network = model_config(config, shards)
    torch.manual_seed(config.seed)
    model = VideoDiT(network)
    optimizer = torch.optim.AdamW(model.parameters(), config.engine.lr, config.engine.betas, weight_decay=0)
    draw = Draw(config, network, Ranks(), torch.device("cpu"))
    ema = [p.detach().clone() for p in model.parameters()]
    data = batches(shards, config.data, seed=config.seed)
    means = []
    for _ in range(steps):
        batch = next(data)
        t, noise, y = draw(batch)
        loss = Diffusion().training_losses(model, batch.x_0, t, y, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.engine.clip)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 1 - config.ema_decay)
        means.append(loss.item())
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return means, flat, torch.cat([e.flatten() for e in ema])


@pytest.mark.slow
def test_zero_2_on_1_2_and_4_ranks_is_plain_adamw(latents, undisturbed, tmp_path):
    config = settings.parse(TrainConfig, words(latents, undisturbed, "run", "--steps", 8))
    means, weights, average = plain(config, 8)
    for ranks in (1, 4):
        train(ranks, words(latents, tmp_path, f"on-{ranks}", "--steps", 8), tmp_path)
    for folder, name in ((tmp_path, "on-1"), (undisturbed, "run"), (tmp_path, "on-4")):
        record, slices = state(folder, name)
        assert record["step"] == 8
        assert record["progress"]["consumed"] == 32
        assert list(losses(folder, name).values()) == pytest.approx(means, rel=1e-5)
        assert (slices["master"] - weights).abs().max() < 2e-5
        assert (slices["ema"] - average).abs().max() < 2e-5


@pytest.mark.slow
def test_an_interrupted_run_is_bit_identical_to_one_that_was_not(latents, undisturbed, tmp_path):
    train(2, words(latents, tmp_path, "run", "--steps", 3), tmp_path)
    first = json.loads((tmp_path / "runs/run/tracking.json").read_text())["run_id"]
    train(2, words(latents, tmp_path, "run", "--steps", 8), tmp_path)
    assert json.loads((tmp_path / "runs/run/tracking.json").read_text())["run_id"] == first
    (record, slices), (expected, reference) = state(tmp_path, "run"), state(undisturbed, "run")
    assert record["progress"] == expected["progress"]
    for name in ckpt.SLICES:
        assert torch.equal(slices[name], reference[name]), name
    assert losses(tmp_path, "run") == losses(undisturbed, "run")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(latents, undisturbed, tmp_path):
    for ranks, steps in ((2, 2), (1, 4), (4, 6), (2, 8)):
        train(ranks, words(latents, tmp_path, "run", "--steps", steps), tmp_path)
    (record, slices), (expected, reference) = state(tmp_path, "run"), state(undisturbed, "run")
    assert record["progress"] == expected["progress"]
    got, wanted = losses(tmp_path, "run"), losses(undisturbed, "run")
    assert list(got.values()) == pytest.approx(list(wanted.values()), rel=1e-4)
    assert (slices["master"] - reference["master"]).abs().max() < 5e-5


@pytest.mark.slow
def test_accumulated_micro_batches_are_the_whole_batch(latents, undisturbed, tmp_path):
    train(1, words(latents, tmp_path, "run", "--steps", 8, "--engine.micro_batch", 1), tmp_path)
    (_, slices), (_, reference) = state(tmp_path, "run"), state(undisturbed, "run")
    assert (slices["master"] - reference["master"]).abs().max() < 5e-5


@pytest.mark.slow
def test_bf16_keeps_float32_masters_and_on_1_2_and_4_ranks_follows_the_float32_losses(latents, undisturbed, tmp_path):
    wanted = list(losses(undisturbed, "run").values())
    for ranks in (1, 2, 4):
        name = f"on-{ranks}"
        train(ranks, words(latents, tmp_path, name, "--steps", 8, "--engine.precision", "bf16"), tmp_path)
        got = list(losses(tmp_path, name).values())
        assert got == pytest.approx(wanted, rel=1e-3)
        assert got == pytest.approx(list(losses(tmp_path, "on-1").values()), rel=1e-4)
        master = state(tmp_path, name)[1]["master"]
        assert not torch.equal(master, master.bfloat16().float())


@pytest.mark.slow
def test_sigterm_ends_a_run_with_a_checkpoint_and_a_second_job_is_refused(latents, tmp_path):
    arguments = words(latents, tmp_path, "run", "--steps", 100_000)
    processes = start(2, arguments, tmp_path)
    journal = tmp_path / "runs" / "run" / "events.jsonl"
    wait_until(lambda: journal.exists() and "loss/mean" in journal.read_text())
    second = train(1, arguments, tmp_path, codes=(2,))
    assert "is being trained by another job" in second[0]
    processes[1].send_signal(signal.SIGTERM)  # One rank is told; all must agree.
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(p.returncode in (75, -signal.SIGABRT) for p in processes), outputs
    record, _ = state(tmp_path, "run")
    assert record["step"] == max(losses(tmp_path, "run"))


@pytest.mark.slow
def test_losses_that_are_not_finite_stop_the_run_and_name_the_samples(latents, tmp_path):
    bad = ("--steps", 50, "--engine.lr", "1e30", "--max_skipped", 3)
    (output,) = train(1, words(latents, tmp_path, "run", *bad), tmp_path, codes=(2,))
    assert "3 steps in a row" in output
    assert "lower engine.lr" in output
    assert "Traceback" not in output
    assert len(re.findall("skipped: not finite, with video", output)) == 3


@pytest.mark.slow
def test_the_video_that_is_not_finite_is_named_whatever_rank_and_micro_batch_it_was_in(tmp_path):
    spoilt = make_shards(tmp_path / "spoilt", [8] * 7, labels=True, spoilt=2)
    arguments = words(spoilt, tmp_path, "run", "--steps", 7, "--engine.micro_batch", 1)
    said = train(2, arguments, tmp_path)
    for output in said:  # Seven steps of four are four epochs of seven.
        named = re.findall("skipped: not finite, with (.+)", output)
        assert len(named) == 4, output
        assert set(named) == {"video2.mp4"}


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_makes_no_preview(latents, tmp_path):
    hold = partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM})  # as launchers/start.py does
    arguments = words(latents, tmp_path, "run", "--steps", 100_000, "--previews.every", 1, "--stop_every", 100)
    (process,) = start(1, arguments, tmp_path, preexec_fn=hold)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode in (75, -signal.SIGABRT), output
    assert "preview" not in output
    assert state(tmp_path, "run")[0]["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_rank_that_loses_its_peer_ends_in_seconds_though_it_has_workers(latents, tmp_path, how):
    """multiprocessing waits at exit for workers, which ignore the signals of a job."""
    more = ("--steps", 100_000, "--data.workers", 1, "--engine.timeout", 10)
    first, second = start(2, words(latents, tmp_path, "run", *more), tmp_path)
    journal = tmp_path / "runs" / "run" / "events.jsonl"
    wait_until(lambda: journal.exists() and "loss/mean" in journal.read_text())
    second.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    try:
        output = first.communicate(timeout=90)[0]
    finally:
        second.kill()
        first.kill()
    assert first.returncode not in (0, -signal.SIGKILL)
    assert ("rank 1 hung, or the node" in output) == (how == "hung")
    assert "DataLoader worker" not in output


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(latents, undisturbed, tmp_path):
    """Of a run, or of a converted folder; a network of another shape is refused."""
    from fvdm.convert import read_model

    _, slices = state(undisturbed, "run")
    still = ("--steps", 1, "--engine.lr", 0)
    train(1, words(latents, tmp_path, "run", *still, "--init", undisturbed / "runs/run"), tmp_path)
    assert torch.equal(state(tmp_path, "run")[1]["master"], slices["ema"])
    model = VideoDiT(
        model_config(settings.parse(TrainConfig, words(latents, tmp_path, "x")), LatentShards(str(latents)))
    )
    model.save_pretrained(tmp_path / "folder")
    train(1, words(latents, tmp_path, "other", *still, "--init", tmp_path / "folder"), tmp_path)
    flat = torch.cat([p.detach().flatten() for p in read_model(tmp_path / "folder").parameters()])
    assert torch.equal(state(tmp_path, "other")[1]["master"], flat)
    wrong = words(latents, tmp_path, "wrong", *still, "--init", tmp_path / "folder", "--model", "T/1")
    (output,) = train(1, wrong, tmp_path, codes=(2,))
    assert "do not fit the model of this run" in output


@pytest.mark.slow
def test_a_run_of_another_model_is_refused(latents, undisturbed):
    (output,) = train(1, words(latents, undisturbed, "run", "--steps", 9, "--model", "T/1"), undisturbed, codes=(2,))
    assert "model of another shape (T/2) than T/1" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_run_goes_on_with_the_latents_it_has_learnt_and_tells_of_other_videos(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "runs" / "run", tmp_path / "runs" / "run")
    for name, field, sentence in (
        ("vae", {"vae_identity": "4567"}, "made with the VAE 'none' (4567), not with 0123"),
        ("size", {"latent_shape": (4, 8, 8)}, "hold latents of shape (4, 8, 8)"),
    ):
        other = make_shards(tmp_path / name, [12, 9], **field)
        arguments = words(other, tmp_path, "run", "--steps", 9)
        (output,) = train(1, arguments, tmp_path, codes=(2,))
        assert sentence in output
        assert "Traceback" not in output
        with pytest.raises(ValueError, match=re.escape(sentence)):  # before the job waits in a queue
            check(settings.parse(TrainConfig, arguments), 1)
    more = make_shards(tmp_path / "more", [12] * 9)
    (output,) = train(1, words(more, tmp_path, "run", "--steps", 9, "--seed", 1), tmp_path)
    assert "not those of the unbroken run: seed was 0 and is 1; the videos in more are others" in output


def test_a_checkpoint_that_says_nothing_of_its_data_is_still_taken(latents, tmp_path):
    config = settings.parse(TrainConfig, words(latents, tmp_path, "run"))
    shards = LatentShards(latents)
    early = {"settings": settings.plain(config), "network": settings.plain(model_config(config, shards))}
    assert changes(early, settings.flatten(config), shards) == []
    assert changes(early | identity(shards), settings.flatten(config), shards) == []
    early["network"]["size"] = 8
    with pytest.raises(ValueError, match="hold latents of shape"):
        changes(early, settings.flatten(config), shards)


def wait_until(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def launch(arguments, folder):
    command = [sys.executable, str(ROOT / "launchers/slurm_train.py"), "--cluster", "local", "--nodes", "2"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*command, "--config", str(folder / "c.yaml"), *arguments],
        cwd=folder,
        env=hidden,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(launcher):
    import psutil

    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if "submitit.core._submit" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "launcher"])
def test_kill_9_and_the_same_command_again(latents, undisturbed, tmp_path, victim):
    (tmp_path / "c.yaml").write_text("name: run\n")
    arguments = words(latents, tmp_path, "run", "--checkpoint.every", 1)
    launcher = launch([*arguments, "--steps", "100000"], tmp_path)
    root = tmp_path / "runs" / "run" / "checkpoints"
    wait_until(lambda: len(ckpt.checkpoints(root)) >= 2)
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    if victim == "rank":
        ranks[1].kill()
        output = launcher.communicate(timeout=120)[0]
        assert launcher.returncode == 1
        assert "rank 1 was killed" in output
    else:
        launcher.kill()
        launcher.communicate()
    wait_until(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), 60)
    done = ckpt.read_state(ckpt.newest(root))["step"]
    again = launch([*arguments, "--steps", str(done + 2)], tmp_path)
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert f"resuming run from step {done}" in output
    assert ckpt.read_state(ckpt.newest(root))["step"] == done + 2
    assert not list(root.glob(".tmp-*"))
    got, wanted = losses(tmp_path, "run"), losses(undisturbed, "run")
    assert all(got[step] == wanted[step] for step in set(got) & set(wanted))


def test_what_cannot_work_is_refused_before_it_is_submitted(latents, tmp_path):
    config = settings.parse(TrainConfig, words(latents, tmp_path, "run"))
    check(config, 2)
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        check(config, 3)
    with pytest.raises(ValueError, match="micro_batch 3 does not divide"):
        check(replace(config, engine=replace(config.engine, micro_batch=3)), 1)
    with pytest.raises(ValueError, match="XL/2"):
        check(replace(config, model="huge"), 1)
    with pytest.raises(ValueError, match=str(tmp_path)):
        check(replace(config, data=replace(config.data, path=str(tmp_path / "nothing"))), 1)
    plain_shards = make_shards(tmp_path / "unlabelled", [8, 8], labels=False)
    with pytest.raises(ValueError, match="no class labels"):
        check(replace(config, conditional=True, data=replace(config.data, path=str(plain_shards))), 1)


def test_accumulation_arithmetic():
    assert accumulation(16, 0, 2) == (8, 1)
    assert accumulation(16, 2, 2) == (2, 4)


def test_the_launcher_says_what_is_wrong_in_one_sentence(latents, tmp_path):
    launcher = ROOT / "launchers/slurm_train.py"
    for more, sentence in (
        (["--modle", "S/2"], "did you mean model?"),
        (["--nodes", "3"], "does not divide among 3 ranks"),
        (["--cluster", "slurm"], "no sbatch"),
    ):
        if more[0] == "--cluster" and any((Path(p) / "sbatch").exists() for p in os.environ["PATH"].split(":")):
            continue
        (tmp_path / "c.yaml").write_text("name: run\n")
        command = [sys.executable, str(launcher), "--cluster", "local", "--gpus-per-node", "0", "--config"]
        command += [str(tmp_path / "c.yaml"), *words(latents, tmp_path, "run"), *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2, done.stdout + done.stderr
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_cannot_be_written_is_told_and_not_called_a_kill(latents, tmp_path):
    (tmp_path / "c.yaml").write_text("name: run\n")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "checkpoints").touch()  # No folder can be made there.
    launcher = launch(words(latents, tmp_path, "run", "--steps", 2), tmp_path)
    output = launcher.communicate(timeout=240)[0]
    assert launcher.returncode == 1
    last = output.partition("\nerror: ")[2]
    assert last.startswith("the last checkpoint, of step 2, could not be written"), output
    assert "was killed" not in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_rank_of_this_machine_that_hangs_is_named_and_ended(latents, tmp_path):
    (tmp_path / "c.yaml").write_text("name: run\n")
    launcher = launch(words(latents, tmp_path, "run", "--steps", 10**6, "--engine.timeout", 10), tmp_path)
    journal = tmp_path / "runs" / "run" / "events.jsonl"
    wait_until(lambda: journal.exists() and "loss/mean" in journal.read_text())
    ranks = ranks_of(launcher)
    ranks[1].suspend()
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1
    assert "error: rank 1 hung" in output
    assert not any(rank.is_running() for rank in ranks)
