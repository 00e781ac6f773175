"""The time of a training step and of sampling, and where the time of a step goes."""

import functools
import gzip
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.acceptance.networks import DTYPES, build, clip, free, network, seconds
from benchmarks.acceptance.record import LeftOutError, Outcome, Record
from benchmarks.sampling_step import time_sampling
from fvdm.models.compilation import compile_blocks
from fvdm.training.plan import flops

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from benchmarks.acceptance.config import AcceptanceConfig
    from fvdm.models.backbone import Backbone

MFU = 0.5  # of the matrix rate measured here: what a compiled step of XL/2 must reach
SECONDS = 0.8  # of a clip by DDIM with 50 steps on an H100; an H200's limit is 0.6
MODES = ("eager", "compiled")
PHASES = ("forward", "backward", "optimizer")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def prepared(config: "AcceptanceConfig", mode: str) -> "Backbone":
    """The network that is timed, in bf16.

    Raises:
        LeftOutError: if it cannot be compiled here.
    """
    free()
    model = build(network(config.timed_model, config), config.device, "bf16")
    try:
        return compile_blocks(model) if mode == "compiled" else model
    except ValueError as error:
        raise LeftOutError(str(error)) from None


def run_speed(record: Record, config: "AcceptanceConfig") -> None:
    """Forward, backward and a whole step with AdamW; the share of the matrix rate."""
    record.check("matrix rate, bf16", functools.partial(find_rate, config))
    for mode in MODES:
        record.check(f"{config.timed_model}, {mode}", functools.partial(time_step, record, config, mode))


def find_rate(config: "AcceptanceConfig") -> Outcome:
    """TFLOP/s of large products, the best of some, by size."""
    sides = (256, 512) if config.smoke else (4096, 8192, 16384)
    rates = {}
    for n in sides:
        a, b = (torch.randn(n, n, device=config.device, dtype=DTYPES["bf16"]) for _ in range(2))
        best = min(seconds(functools.partial(torch.matmul, a, b), config.device, 1) for _ in range(10))
        rates[f"{n}, TFLOP/s"] = 2 * n**3 / best / 1e12
    return Outcome(rates | {"best, TFLOP/s": max(rates.values())})


def optimizer_of(model: "Backbone") -> "Optimizer":
    """AdamW as training uses it."""
    return torch.optim.AdamW(model.parameters(), 1e-4, fused=True)


def take_step(model: "Backbone", optimizer: "Optimizer", config: "AcceptanceConfig") -> None:
    """Forward, backward and AdamW on fixed latents."""
    x, t = (tensor.to(config.device) for tensor in clip(model.config, config.timed_batch))
    with torch.profiler.record_function("forward"):
        loss = model(x.to(DTYPES["bf16"]), t).float().square().mean()
    with torch.profiler.record_function("backward"):
        loss.backward()
    with torch.profiler.record_function("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


def time_step(record: Record, config: "AcceptanceConfig", mode: str) -> Outcome:
    """Milliseconds of a clip in a step, clips/s, and the share of the matrix rate.

    Raises:
        LeftOutError: if the network cannot be compiled here.
    """
    model = prepared(config, mode)
    step = functools.partial(take_step, model, optimizer_of(model), config)
    time_ = seconds(step, config.device, 2 if config.smoke else 10) / config.timed_batch
    rate = record.checks["matrix rate, bf16"]["values"]["best, TFLOP/s"]
    share = flops(model.config) / time_ / 1e12 / rate
    values = {"ms a clip": 1e3 * time_, "clips/s": 1 / time_, "TFLOP/s": share * rate, "MFU": share}
    if config.device == "cpu" or mode == "eager":
        return Outcome(values)
    return Outcome(values, share >= MFU, f"MFU {MFU:.0%} of the measured matrix rate")


def run_sampling(record: Record, config: "AcceptanceConfig") -> None:
    """Seconds of a clip by DDIM."""
    for mode in MODES:
        record.check(f"{config.timed_model}, DDIM, {mode}", functools.partial(time_clip, config, mode))


def time_clip(config: "AcceptanceConfig", mode: str) -> Outcome:
    """Seconds of one clip, and what a step costs on top of its forward pass.

    Raises:
        LeftOutError: if the network cannot be compiled here.
    """
    model, place = prepared(config, mode).eval(), torch.device(config.device)
    steps = 3 if config.smoke else 50
    with torch.no_grad():
        time_sampling(model, 2, 1, place)
        rounds = [time_sampling(model, steps, 1, place) for _ in range(1 if config.smoke else 5)]
    values = {
        "steps": steps,
        "seconds a clip": statistics.median(total for total, _ in rounds),
        "step / forward pass": statistics.median(total / inside for total, inside in rounds),
    }
    if config.device == "cpu" or mode == "eager":
        return Outcome(values)
    return Outcome(values, values["seconds a clip"] <= SECONDS, f"{SECONDS} s a clip")


def run_profile(record: Record, config: "AcceptanceConfig") -> None:
    """Where the time of a step goes."""
    for mode in MODES:
        record.check(f"{config.timed_model}, {mode}", functools.partial(profile_step, config, mode, record.out))


def profile_step(config: "AcceptanceConfig", mode: str, out: Path) -> Outcome:
    """The kernels that take most time, the number of launches, and a trace for chrome://tracing or Perfetto.

    Raises:
        LeftOutError: if the network cannot be compiled here.
    """
    from torch.profiler import ProfilerActivity, profile

    model = prepared(config, mode)
    step = functools.partial(take_step, model, optimizer_of(model), config)
    for _ in range(3):
        step()
    on_gpu = config.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    trace = out / f"trace-{mode}.json"
    found.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()
    averages = list(found.key_averages())
    parts = {row.key: row for row in averages if row.key in PHASES}
    rows = [row for row in averages if row.key not in PHASES]

    def own(row: object) -> float:
        return float(getattr(row, "self_device_time_total" if on_gpu else "self_cpu_time_total"))

    total = sum(map(own, rows)) or 1.0
    top = sorted(rows, key=own, reverse=True)[:12]
    launches = sum(row.count for row in rows if row.key in LAUNCHES)
    values = {f"{name}, ms": row.cpu_time_total / 1e3 for name, row in parts.items()}
    shares = [f"{row.key[:60]} {own(row) / total:.1%} ({row.count} calls)" for row in top]
    values |= {"launches": launches, "operations, ms": total / 1e3}
    return Outcome(values | {"most time": shares, "trace": f"{trace}.gz"})
