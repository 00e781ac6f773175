"""The engine on real ranks: parameter groups and frozen parameters, saved and resumed on another number of ranks."""

import subprocess
import sys

import pytest
import torch

from fvdm.checkpoints.find import newest
from fvdm.checkpoints.layout import SLICES
from fvdm.checkpoints.read import read_slice, read_state, read_weights
from fvdm.distributed import free_port
from tests.runs import ROOT, environment

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
from fvdm.checkpoints.layout import SLICES
from fvdm.checkpoints.read import read_slices
from fvdm.checkpoints.save import save
from fvdm.checkpoints.writer import AsyncCheckpointWriter
from fvdm.distributed import from_environment
from fvdm.training.config import EngineConfig
from fvdm.training.ema import EMA
from fvdm.training.engine import Engine, initialise

first, last, root, resume = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.frozen, self.b = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x, t, y):
        return self.b(torch.tanh(self.frozen(torch.tanh(self.a(x)))))

torch.manual_seed(0)
ranks = from_environment()
initialise(60)
net = Net()
groups = [{"params": [*net.b.parameters()], "weight_decay": 0.1}, {"params": [*net.a.parameters()]}]
engine = Engine(net, EngineConfig(lr=1e-2, precision="fp32", grad_clip_start=0), 4, ranks, groups)
ema = EMA(engine.masters, 0.9)
if resume != "-":
    slices = read_slices(Path(resume), SLICES, engine.slices)
    engine.load_state(slices, first)
    for shard, values in zip(ema.shards, slices["ema"], strict=True):
        shard[: len(values)] = values
for step in range(first, last):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).chunk(ranks.world_size)[ranks.rank]
    engine.backward(engine(x, None, None).square().mean())
    assert engine.step(step, 100)
    ema.update()
writer = AsyncCheckpointWriter(False, 60)
begin = [part.start for part in engine.slices]
state = {"names": engine.names, "settings": {}}

def write(slices):
    save(root, last, slices, begin, state, ranks.rank, ranks.world_size, writer.barrier)

writer.begin(engine.state() | engine.own("ema", ema.shards), write)
assert writer.wait() is None
engine.close()
"""


def run(ranks, first, last, root, resume="-"):
    port = free_port()
    command = [sys.executable, "-c", SCRIPT, str(first), str(last), str(root), str(resume)]
    processes = [
        subprocess.Popen(command, env=environment(rank, ranks, port), stdout=-1, stderr=-2, text=True, cwd=ROOT)
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    folder = newest(root)
    assert folder is not None, outputs
    return folder, {name: read_slice(folder, name, range(66)) for name in SLICES}


def by_hand(steps):
    """The same in plain PyTorch: the flat vector, in the order of the groups."""
    from torch import nn

    torch.manual_seed(0)
    a, frozen, b = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
    groups = [{"params": [*b.parameters()], "weight_decay": 0.1}, {"params": [*a.parameters()]}]
    optimizer = torch.optim.AdamW(groups, 1e-2, weight_decay=0)
    for step in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        b(torch.tanh(frozen(torch.tanh(a(x))))).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([*a.parameters(), *b.parameters()], 0.1)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in (*b.parameters(), *a.parameters())])


@pytest.mark.slow
def test_groups_are_saved_and_resumed_on_other_ranks_and_frozen_parameters_are_in_none(tmp_path):
    half, _ = run(2, 0, 2, tmp_path / "two")
    folder, resumed = run(1, 2, 4, tmp_path / "one", half)
    assert (resumed["master"] - by_hand(4)).abs().max() < 1e-6
    assert list(read_state(folder)["names"]) == ["b.weight", "b.bias", "a.weight", "a.bias"]
    assert set(read_weights(folder)) == {"b.weight", "b.bias", "a.weight", "a.bias"}


@pytest.mark.slow
def test_a_checkpoint_before_any_update_is_a_checkpoint(tmp_path):
    folder, slices = run(2, 0, 0, tmp_path / "none")
    assert torch.equal(slices["master"], by_hand(0))
    assert not slices["exp_avg"].any()
    _, after = run(2, 0, 2, tmp_path / "after", folder)
    assert (after["master"] - by_hand(2)).abs().max() < 1e-6
