import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fvdm.data.config import DataConfig
from fvdm.data.shards import LatentShards
from fvdm.diffusion.process import Diffusion
from fvdm.distributed import Ranks, free_port
from fvdm.models import build, preset
from fvdm.training.config import PreviewConfig
from fvdm.training.previews import Previews
from tests.data_fixtures import make_shards
from tests.latte import randomised
from tests.runs import ROOT, environment


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small_previews(path, folder, **changes):
    """Previews of a tiny network on the given shards, and the network."""
    shards = LatentShards(str(path))
    channels, side, _ = shards.latent_shape
    net = randomised(build(replace(preset("T/2"), channels=channels, size=side, frames=6))).eval()
    config = PreviewConfig(**{"tasks": ("generate",), "num": 3, "steps": 3, "long_frames": 10} | changes)
    data = DataConfig(path=str(path), frames=6, stride=1, batch_size=2, workers=0)
    return Previews(Diffusion(), shards, data, config, Ranks(), torch.device("cpu"), folder), net


def test_previews_of_every_task_hold_the_same_given_frames_each_time(tmp_path):
    path = make_shards(tmp_path / "latents", [12, 9, 10, 30, 8, 11, 6])
    tasks = ("generate", "image-to-video", "long", "stream")
    previews, net = small_previews(path, tmp_path, tasks=tasks, solver="unipc")
    first, second = previews.sample(net), previews.sample(net)
    for task, length in (("generate", 6), ("image-to-video", 6), ("long", 10), ("stream", 10)):
        assert first[task].shape == (3, length, *previews.shards.latent_shape)
        assert torch.equal(first[task], second[task])
    assert torch.equal(first["image-to-video"][:, 0], first["long"][:, 0])
    assert not torch.equal(first["image-to-video"][:, 1], first["long"][:, 1])


class Broken(torch.nn.Module):
    config = preset("T/2")

    def forward(self, x, t, y=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_a_preview_that_fails_or_cannot_be_decoded_costs_a_line(group, tmp_path, caplog):
    path = make_shards(tmp_path / "latents", [12] * 4)
    previews, net = small_previews(path, tmp_path / "previews")
    previews.make(Broken(), 7, object())
    assert "no preview of step 7: rank 0: OutOfMemoryError: CUDA out of memory." in caplog.text
    previews.make(net, 8, object())  # The shards name a VAE that nobody has.
    assert "no preview of step 8: ValueError: " in caplog.text
    assert not (tmp_path / "previews").exists()


LAST_RANK_FAILS = """
import logging, sys
from pathlib import Path
import torch, torch.distributed as dist
from dataclasses import replace
from tests.training.test_previews import Broken, small_previews
from fvdm.distributed import from_environment

logging.basicConfig()
ranks = from_environment()
dist.init_process_group("gloo")
previews, net = small_previews(sys.argv[1], Path(sys.argv[2]))
previews = replace(previews, ranks=ranks)
previews.make(Broken() if ranks.rank == 1 else net, 7, None)
total = torch.ones(1)
dist.all_reduce(total)
print("agreed", total.item(), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_preview_that_fails_on_one_rank_fails_on_all_and_training_goes_on(tmp_path):
    path, port = make_shards(tmp_path / "latents", [12] * 4), free_port()
    command = [sys.executable, "-c", LAST_RANK_FAILS, str(path), str(tmp_path / "previews")]
    both = [
        subprocess.Popen(command, env=environment(rank, 2, port), stdout=-1, stderr=-2, text=True, cwd=ROOT)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert all("agreed 2.0" in output for output in outputs), outputs
    assert "no preview of step 7: rank 1: OutOfMemoryError" in outputs[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"tasks": ("img2vid",)}, "is unknown"), ({"tasks": ("any-frame",)}, "by index"), ({"solver": "x"}, "ddim, ddpm")],
)
def test_what_could_give_no_preview_is_refused_before_a_run_begins(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        PreviewConfig(**changes)
