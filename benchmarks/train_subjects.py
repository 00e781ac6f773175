"""Networks in training, as benchmarks/train_speed.py times them: ours, diffusers' and those of a file."""

import contextlib
import functools
import importlib.util
import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import process_memory
from benchmarks.peers import DiffusersLatte, DiffusersWan
from fvdm.models.compilation import compile_blocks
from fvdm.models.config import BackboneConfig, Backend
from fvdm.models.loading import build
from fvdm.training.ema import EMA

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = ("width", "depth", "heads", "patch", "channels", "size", "frames")
OURS = ("fvdm", "compiled")


def peer_class(where: str) -> Callable[..., nn.Module]:
    """The class that `FILE.py:CLASS` names.

    Raises:
        ValueError: if there is none.
    """
    path, _, name = where.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"--peer {where}: give FILE.py:CLASS; there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"--peer {where}: {path} has no class {name}")
    return getattr(module, name)


class Subject:
    """A network in training, ready to be timed."""

    def __init__(self, name: str, config: BackboneConfig, precision: str, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        dtype = DTYPES[precision]
        autocast = precision == "bf16" and name not in OURS and not config.text_width
        if name in OURS:
            ours = build(config).to(device, dtype)
            self.net: nn.Module = compile_blocks(ours) if name == "compiled" else ours
        elif config.text_width:
            self.net = DiffusersWan(config).to(device, dtype)
        else:
            shape = {key: getattr(config, key) for key in SHAPE}
            self.net = (DiffusersLatte if name == "diffusers" else peer_class(name))(**shape).to(device)
        self.context = functools.partial(torch.autocast, device.type, dtype) if autocast else contextlib.nullcontext
        x = torch.randn(batch, *config.clip_shape, device=device)
        t = torch.randint(1, 1000, (batch, config.frames), device=device)
        self.inputs: tuple[Tensor, ...] = (x, t)
        if config.text_width:
            self.inputs = (x, t, torch.randn(batch, config.text_length, config.text_width, device=device))
        self.device = device
        self.optimizer: torch.optim.Optimizer | None = None

    def forward(self) -> None:
        """Without gradients."""
        with torch.no_grad(), self.context():
            self.net(*self.inputs)

    def backward(self) -> None:
        """Forward and backward."""
        with self.context():
            loss = self.net(*self.inputs).float().square().mean()
        loss.backward()

    def step(self) -> None:
        """Forward, backward, AdamW on float32 masters and their EMA."""
        if self.optimizer is None:
            self.masters = [nn.Parameter(p.detach().float()) for p in self.net.parameters()]
            self.optimizer = torch.optim.AdamW(self.masters, 1e-4, fused=True)
            self.ema = EMA([master.detach() for master in self.masters])
        self.net.zero_grad()
        self.backward()
        for master, p in zip(self.masters, self.net.parameters(), strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()
        self.ema.update()
        with torch.no_grad():
            torch._foreach_copy_([*self.net.parameters()], [*self.masters])

    def seconds(self, kind: str) -> float:
        """Time one."""
        function = {"forward": self.forward, "forward+backward": self.backward, "step": self.step}[kind]
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def matrix_rate(precision: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of some."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        c = a @ b
        c[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def _own_peak(name: str, config: BackboneConfig, precision: str, batch: int) -> float:
    """In a process of its own: bytes that two steps add to what the process holds before."""
    subject = Subject(name, config, precision, batch, torch.device("cpu"))
    process_memory.reset_peak()
    before = process_memory.peak()
    subject.step()
    subject.step()
    return process_memory.peak() - before


def peak_memory(name: str, config: BackboneConfig, precision: str, batch: int, device: torch.device) -> float:
    """Bytes that a training step needs on top of the network."""
    if device.type == "cuda":
        subject = Subject(name, config, precision, batch, device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        subject.step()
        subject.step()
        return float(torch.cuda.max_memory_allocated() - before)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_own_peak, name, config, precision, batch).result()


def parity(config: BackboneConfig, device: torch.device) -> dict[str, float]:
    """How far the network's output with each attention backend that runs here is from exact float32 products.

    Returns:
        root mean square distance over the root mean square of the output, by backend and precision.
    """
    outputs: dict[str, Tensor] = {}
    x = torch.randn(1, *config.clip_shape, device=device)
    t = torch.full(x.shape[:2], 500, device=device)
    backends: tuple[Backend, ...] = ("math", "sdpa", "flash")
    for precision, backend in itertools.product(("fp32", "bf16"), backends):
        torch.manual_seed(0)
        net = build(replace(config, attention=backend))
        for weight in net.parameters():
            if not weight.any():  # A new network's output is zero, whatever its attention does.
                nn.init.normal_(weight, std=0.02)
        with contextlib.suppress(ValueError), torch.no_grad():  # flash-attn where it is not, or in float32
            outputs[f"{backend} {precision}"] = net.to(device, DTYPES[precision])(x, t).float()
    exact = outputs["math fp32"]
    return {f"attention {name}, distance": float((out - exact).norm() / exact.norm()) for name, out in outputs.items()}
