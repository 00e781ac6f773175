from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fvdm.data.config import DataConfig
from fvdm.data.shards import LatentShards
from fvdm.diffusion.process import Diffusion
from fvdm.distributed import Ranks
from fvdm.models import build, preset
from fvdm.training import previews
from fvdm.training.config import PreviewConfig
from fvdm.training.previews import preview
from tests.data_fixtures import make_shards
from tests.latte import randomised


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_previews_of_every_task_hold_the_same_given_frames_each_time(group, tmp_path, monkeypatch):
    path = make_shards(tmp_path / "latents", [12, 9, 10, 30, 8, 11, 6])
    shards = LatentShards(str(path))
    channels, side, _ = shards.latent_shape
    net = randomised(build(replace(preset("T/2"), channels=channels, size=side, frames=6))).eval()
    wrote = []
    monkeypatch.setattr(previews, "_write", lambda latents, *rest: wrote.append(latents))
    config = PreviewConfig(
        tasks=("generate", "image-to-video", "long", "stream"), num=3, steps=3, long_frames=10, solver="unipc"
    )
    data = DataConfig(path=str(path), frames=6, stride=1, batch_size=2, workers=0)
    for _ in range(2):
        cpu = torch.device("cpu")
        preview(net, Diffusion(), shards, data, config, Ranks(), cpu, tmp_path, 1, object())  # type: ignore[arg-type]
    for task, length in (("generate", 6), ("image-to-video", 6), ("long", 10), ("stream", 10)):
        assert wrote[0][task].shape == (3, length, channels, side, side)
        assert torch.equal(wrote[0][task], wrote[1][task])
    assert torch.equal(wrote[0]["image-to-video"][:, 0], wrote[0]["long"][:, 0])
    assert not torch.equal(wrote[0]["image-to-video"][:, 1], wrote[0]["long"][:, 1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"tasks": ("img2vid",)}, "is unknown"), ({"tasks": ("any-frame",)}, "by index"), ({"solver": "x"}, "ddim, ddpm")],
)
def test_what_would_end_a_run_at_its_first_preview_is_refused_before(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        PreviewConfig(**changes)
