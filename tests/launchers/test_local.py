"""A job of this machine: how signals end it, whose GPUs it sees, and what a bare command does."""

import os
import re
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from fvdm.checkpoints.find import newest
from fvdm.checkpoints.read import read_state
from fvdm.distributed import from_environment
from fvdm.tracking import run_of
from launchers import slurm_train
from launchers.config import Resources, part_of
from launchers.job import _show_gpus
from launchers.resources import resolve
from tests.data_fixtures import make_shards
from tests.runs import ROOT, launch, ranks_of, wait_until, words

TRAIN = str(ROOT / "launchers" / "slurm_train.py")
CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def run(*words, cwd, python=sys.executable, **environment):
    return subprocess.run(
        [python, *map(str, words)],
        cwd=cwd,
        env=os.environ | CPU | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_words_to_go_on(tmp_path, number):
    from mlflow.tracking import MlflowClient

    latents = make_shards(tmp_path / "latents", [12, 9, 10], labels=True)
    (tmp_path / "c.yaml").write_text("name: run\n")
    launcher = launch(words(latents, tmp_path, "run", "--steps", 10**6), tmp_path)
    journal = tmp_path / "runs" / "run" / "events.jsonl"
    wait_until(lambda: journal.exists() and "loss/mean" in journal.read_text())
    ranks = ranks_of(launcher)
    launcher.send_signal(number)
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 128 + number, output
    assert f"{number.name}: stopping after this step, with a checkpoint" in output
    assert re.search(r"To continue from the newest checkpoint, type: .*slurm_train.py --cluster local", output)
    assert newest(tmp_path / "runs/run/checkpoints") is not None
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(run_of(tmp_path / "runs/run")).info.status == "KILLED"
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_a_bare_command_trains_on_the_sample_clips(tmp_path):
    """Four processes of this machine, as no controller of Slurm's answers; without latents, it names their command."""
    done = run(TRAIN, "--nodes", 4, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("make them with: python data_prep/encode_latents.py")
    assert not list(tmp_path.iterdir())
    make_shards(tmp_path / "latents" / "sample", [20, 18, 16], labels=False)
    done = run(TRAIN, "--nodes", 4, "--steps", 2, cwd=tmp_path, SLURM_CONF="/nowhere/slurm.conf")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running on this machine (--cluster local)" in done.stdout
    assert "no GPUs: training XS/4 for 2 steps" in done.stdout
    assert "as 4 processes on this machine" in done.stdout
    assert "--name mine --data.path latents/mine" in done.stdout
    assert "sample is complete at step 2" in done.stdout
    # A folder for each start: another job's process may have had the number by which submitit names this one.
    assert re.search(r"runs/sample/jobs/local-\d{8}-\d{6}-\d+/\d+_0_log.out", done.stdout)
    assert "fvdm generate --checkpoint runs/sample" in done.stdout
    assert read_state(newest(tmp_path / "runs/sample/checkpoints"))["world_size"] == 4


@pytest.mark.parametrize(("gpus", "model", "batch"), [(8, "XL/2", "128"), (0, "XS/4", "4")])
def test_a_bare_command_takes_the_model_that_the_machines_can_train(tmp_path, monkeypatch, capsys, gpus, model, batch):
    """What Slurm has is made up here; the test machines have no GPUs."""
    (tmp_path / "latents" / "sample").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launchers.resources.why_no_slurm", lambda: "")
    monkeypatch.setattr("launchers.resources.ask_nodes", lambda partition: (gpus, 16))
    found = slurm_train.with_config(["--nodes", "4"])
    config = slurm_train.parse(found)
    resources = resolve(part_of(config, Resources))
    assert (config.model, str(config.data.batch_size), config.data.path) == (model, batch, "latents/sample")
    assert (resources.cluster, resources.world_size) == ("slurm", 4 * max(1, gpus))
    assert f"training {model} for" in capsys.readouterr().out
    given = ["--config", "mine.yaml"]
    assert slurm_train.with_config(given) == given


@pytest.mark.parametrize("script", ["slurm_train.py", "slurm_run.py", "demo.py"])
def test_without_the_packages_a_launcher_says_make_install(tmp_path, script):
    """A copy of the project without a virtual environment, and a Python that has no packages."""
    for name in ("launchers", "data_prep", "fvdm", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    venv.create(tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    text = f"import runpy, sys; sys.argv = ['{script}']; sys.dont_write_bytecode = True\n"
    text += "from data_prep import installed; import pathlib; installed.ROOT = pathlib.Path('/nowhere')\n"
    text += f"runpy.run_path('{tmp_path}/launchers/{script}', run_name='__main__')\n"
    done = run("-c", text, cwd=tmp_path, python=python, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "make install" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("visible", ["3,5", "GPU-8f7a,GPU-11aa", "", None])
def test_the_ranks_see_the_gpus_that_the_user_has_chosen(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # what submitit sets
    _show_gpus(visible)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize(("gpus", "local", "device"), [(0, 3, 3), (1, 3, 0), (4, 3, 3), (8, 7, 7)])
def test_a_rank_that_sees_only_its_own_gpu_takes_it(monkeypatch, gpus, local, device):
    """As with --sbatch gpus-per-task=1. The number of GPUs is made up here; the test machines have none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    environment = {"RANK": 3, "LOCAL_RANK": local, "WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    ranks = from_environment()
    assert (ranks.local_rank, ranks.local_world_size) == (device, 8)
    assert os.environ["LOCAL_RANK"] == str(device)


def test_gpus_that_are_named_by_uuid_keep_deepspeed_from_pynvml(monkeypatch):
    """DeepSpeed takes the names for numbers, and its ValueError would be taken for the user's."""
    from deepspeed.accelerator import cuda_accelerator

    from fvdm.training.engine import allow_gpu_names

    library = object()
    for visible, used in (("0,3", library), ("", library), ("GPU-8f7a,GPU-11aa", None), ("MIG-77/1/0", None)):
        monkeypatch.setattr(cuda_accelerator, "pynvml", library)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        allow_gpu_names()
        assert cuda_accelerator.pynvml is used


def test_help_lists_both_kinds_of_settings_with_their_defaults_and_nothing_else(tmp_path):
    done = run(TRAIN, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (
        "--nodes N",
        "--warn N",
        "[300]",
        "--gpu-bind",
        "--model MODEL",
        "[XL/2]",
        "--engine.lr X",
        "[0.0001]",
    ):
        assert text in done.stdout
    for text in ("submitting", "running on this machine (--cluster local)", "print_config", "jsonargparse", "ARG:"):
        assert text not in done.stdout + done.stderr
    assert not list(Path(tmp_path).iterdir())
