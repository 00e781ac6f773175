"""How fast the network trains, beside other networks of the same size, in one run on one machine.

    python benchmarks/train_speed.py --models S/2 B/2
    python benchmarks/train_speed.py --models S/2 --peer path/to/file.py:Class --memory
    python benchmarks/train_speed.py --models wan:1.3B --depth 2 --clip 5x16x30x52 --memory

Times forward, forward + backward, and a whole step (with AdamW and the EMA) on random latents. All subjects take turns,
round after round, so that whatever else the machine does hits all alike; the figures are medians, the ratios medians of
the rounds' ratios. Model-FLOPs utilisation is against the matrix rate measured in the same run.

Subjects: `fvdm` in each precision (weights in that precision, as the engine trains), with `--compile` also `compiled`,
the same network with the setting compile, `diffusers` (its LatteTransformer3DModel of the same width and depth; or its
WanTransformer3DModel with a timestep per token and weights in the same precision), and `--peer FILE.py:CLASS`, built as
`Class(width=, depth=, heads=, patch=, channels=, size=, frames=)` and called with `x (b f c h w), t (b f)`. Latte's
peers run in float32, and in bfloat16 under autocast.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers import DiffusersLatte, DiffusersWan
from fvdm.config import fail
from fvdm.models.compilation import compile_blocks
from fvdm.models.config import BackboneConfig, Backend
from fvdm.models.loading import build, preset
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.tracker import Tracker
from fvdm.training.ema import EMA
from fvdm.training.plan import flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = ("width", "depth", "heads", "patch", "channels", "size", "frames")
KINDS = ("forward", "forward+backward", "step")
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    subject.step()
    subject.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0


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


def measure(config: BackboneConfig, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds, ratios to ours and utilisation, by name."""
    ours = OURS if options.compile else OURS[:1]
    names = [*ours, *(["diffusers"] if options.diffusers else []), *options.peer]
    pairs = [(name, precision) for name in names for precision in options.precisions]
    subjects = {pair: Subject(pair[0], config, pair[1], options.batch, device) for pair in pairs}
    rates = {precision: matrix_rate(precision, device) for precision in options.precisions}
    times: dict[tuple[str, str, str], list[float]] = {}
    for round_ in range(options.rounds + 1):
        for (name, precision), subject in subjects.items():
            for kind in options.kinds:
                seconds = subject.seconds(kind)
                if round_:  # The first warms up.
                    times.setdefault((name, precision, kind), []).append(seconds)
    results: dict[str, float] = {f"matrix rate {p}, TFLOP/s": rate / 1e12 for p, rate in rates.items()}
    for (name, precision, kind), values in times.items():
        label = f"{Path(name).name} {precision} {kind}"
        results[f"{label}, s"] = statistics.median(values)
        if name in OURS:
            done = options.batch * flops(config, training=kind != "forward")
            results[f"{label}, MFU"] = done / statistics.median(values) / rates[precision]
        for own in ours[: ours.index(name)] if name in ours else ours:
            rounds = zip(values, times[own, precision, kind], strict=True)
            results[f"{label} / {own}"] = statistics.median(value / other for value, other in rounds)
    del subjects
    if options.parity:
        results |= parity(config, device)
    if options.memory:
        for name, precision in pairs:
            results[f"{Path(name).name} {precision}, GB of a step"] = (
                peak_memory(name, config, precision, options.batch, device) / 1e9
            )
    return results


def main() -> None:
    """Measure, print, and log to MLflow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["S/2"], help="sizes and patches")
    parser.add_argument("--depth", type=int, default=0, help="blocks, in place of the model's own number")
    parser.add_argument("--clip", default="16x4x32x32", help="frames x channels x height x width of the latents")
    parser.add_argument("--batch", type=int, default=1, help="clips at once")
    parser.add_argument("--precisions", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is timed")
    parser.add_argument("--rounds", type=int, default=5, help="turns that every subject takes")
    parser.add_argument("--attention", default="auto", help="attention backend of ours")
    parser.add_argument("--compile", action="store_true", help="time ours with compiled blocks, too")
    parser.add_argument("--parity", action="store_true", help="compare the attention backends' results, too")
    parser.add_argument("--no-diffusers", dest="diffusers", action="store_false", help="leave diffusers out")
    parser.add_argument("--peer", action="append", default=[], metavar="FILE.py:CLASS", help="another network")
    parser.add_argument("--memory", action="store_true", help="measure the memory of a step, too")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/train_speed"), help="journal of the run")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        f, c, h, w = (int(part) for part in options.clip.split("x"))
        for name in options.models:
            config = preset(name)
            config = config.fit((c, h, w), f, 0, learned_variance=not config.text_width)
            if h != w and not config.text_width:
                raise ValueError(f"--clip {options.clip}: frames are square")
            if config.text_width and (options.peer or options.parity):
                raise ValueError(f"{name} takes texts: leave out --peer and --parity, which give none")
            config = replace(config, attention=options.attention, depth=options.depth or config.depth)
            figures = measure(config, options, device)
            print(f"{name}, {options.batch} x {options.clip}, {device}, {torch.get_num_threads()} threads")
            for label, value in figures.items():
                print(f"  {label:48s} {value:9.3f}")
            params = vars(options) | {"model": name, "device": str(device)}
            settings = TrackingConfig(experiment="benchmarks")
            tracker = Tracker(options.out / name.replace("/", "-"), settings, f"train_speed {name}", params, {})
            tracker.figures(figures)
            tracker.close()
    except ValueError as error:
        fail(error)
    except BrokenProcessPool:
        fail("a process that measures memory was killed: there is too little of it; take a smaller --batch")


if __name__ == "__main__":
    main()
