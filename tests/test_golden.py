"""Golden losses: what makes a step faster or smaller leaves 20 steps of training what plain PyTorch makes of them."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.timesteps import sample_timesteps
from fvdm.distributed import from_environment
from fvdm.models import build, compile_blocks, preset
from fvdm.training.config import EngineConfig
from fvdm.training.engine import Engine, initialise

STEPS = 20
CONFIG = replace(preset("T/2"), depth=4, size=8, frames=6, attention="math")


def network(**changes):
    torch.manual_seed(0)
    return build(replace(CONFIG, **changes))


def draws():
    """`x_0`, `t` and noise of each step; the same ones always."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x_0, noise = torch.randn(2, 2, 6, 4, 8, 8, generator=generator)
        yield x_0, sample_timesteps((2, 6), 0.5, generator=generator), noise


def train(model, **how):
    """Losses of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0, **how)
    losses = []
    for x_0, t, noise in draws():
        loss = Diffusion().training_losses(model, x_0, t, None, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain(linear, x, shift, scale):
    return linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


@pytest.fixture(scope="module")
def golden():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fvdm.models.latte.modulated", plain)
        losses = train(network(), foreach=False, fused=False)
    assert losses[-1] < losses[0] - 0.01, "it learns"
    return pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": 1},
        {"activation_checkpointing": 3},
        {"attention": "sdpa"},
        {"attention": "auto"},
    ],
)
def test_settings_of_the_network_leave_the_losses(golden, changes):
    assert train(network(**changes), fused=True) == golden


@pytest.fixture
def compiler():
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_blocks_leave_the_losses_under_zero_2_and_compile_once(golden, compiler, monkeypatch):
    """On a real engine: no break in a graph, none compiled after the first step, the weights named as before."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # Put back afterwards: `from_environment` makes them up.
        monkeypatch.delenv(name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ranks = from_environment()
    initialise(60)
    model = compile_blocks(network(activation_checkpointing=2))  # One of the kinds is computed again.
    engine = Engine(model, EngineConfig(lr=1e-3, precision="fp32"), 2, ranks)
    losses, before = [], graphs()
    try:
        for step, (x_0, t, noise) in enumerate(draws()):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                loss = Diffusion().training_losses(engine, x_0, t, None, noise).mean()
                engine.backward(loss)
                assert engine.step(step, STEPS)
            losses.append(loss.item())
    finally:
        engine.close()
    assert losses == golden
    assert graphs() - before == 2, "one for space, one for time"
    assert not counters["graph_break"]
    assert set(model.state_dict()) == set(network().state_dict())


@pytest.mark.slow
def test_a_batch_or_number_of_frames_does_not_compile_again(compiler):
    """Tasks differ in their matrices, and the last batch in its size: neither is the business of a graph."""
    model = compile_blocks(network(depth=2).eval(), backend="eager")
    with torch.no_grad():
        for b, f in ((2, 6), (3, 6), (3, 5)):  # The first shape, and then any.
            model(torch.zeros(b, f, 4, 8, 8), torch.ones(b, f, dtype=torch.long))
        before = graphs()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for b, f in ((4, 6), (2, 3), (7, 4)):
                for t in (torch.full((b, f), 900), torch.arange(f).expand(b, f) * 100):
                    model(torch.zeros(b, f, 4, 8, 8), t)
    assert graphs() == before
    assert not counters["graph_break"]


def test_without_a_compiler_there_is_one_sentence(compiler, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        ValueError, match=r"does not work here for cpu .*No working C\+\+ compiler.*leave .* compile off"
    ):
        compile_blocks(network())
