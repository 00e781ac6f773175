"""Whether the device computes what float32 on the CPU computes: outputs, every gradient, samples, optimizer steps."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.acceptance.networks import DTYPES, build, clip, free, network
from benchmarks.acceptance.record import LeftOutError, Outcome, Record
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.sampling import draw_noise, generators, sample
from fvdm.diffusion.timesteps import full_sequence
from fvdm.models.compilation import compile_blocks

if TYPE_CHECKING:
    from benchmarks.acceptance.config import AcceptanceConfig
    from fvdm.models.config import BackboneConfig

LIMITS = {"fp32": (1e-3, 2e-3), "bf16": (0.05, 0.1)}  # relative error of the output, and of the whole gradient
MODES = ("eager", "compiled", "checkpointed")
ROOT = Path(__file__).resolve().parents[2]


def run(record: Record, config: "AcceptanceConfig") -> None:
    """All checks of the part."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    shape = network("T/2" if config.smoke else "S/2", config)
    reference = functools.cache(lambda: gradients(shape, "cpu", "fp32", "eager"))
    for precision in DTYPES:
        for mode in MODES:
            if config.smoke and (precision, mode) == ("fp32", "compiled"):
                continue  # Compilation takes most of the time here, and once is enough to see that it works.
            function = functools.partial(compare, reference, shape, config.device, precision, mode)
            record.check(f"network, {precision}, {mode}", function)
        functions = functools.partial(compare_functions, shape, config.device, precision)
        record.check(f"own autograd functions, {precision}", functions)
    record.check("losses of the diffusion process", functools.partial(compare_losses, config.device))
    record.check("samples of one clip and of eight", functools.partial(compare_samples, shape, config.device))
    record.check("host-device syncs of a step", functools.partial(find_syncs, shape, config.device))


def gradients(shape: "BackboneConfig", device: str, precision: str, mode: str) -> dict[str, Tensor]:
    """The output and every gradient of a fixed loss, float32 on the CPU, by name.

    Raises:
        LeftOutError: if the blocks cannot be compiled here.
    """
    every = 2 if mode == "checkpointed" else 0
    model = build(replace(shape, activation_checkpointing=every), device, precision)
    if mode == "compiled":
        try:
            compile_blocks(model)
        except ValueError as error:
            raise LeftOutError(str(error)) from None
    for layer in model.modules() if mode == "plain" else ():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda layer, inputs: None)
    x, t = (tensor.to(device) for tensor in clip(shape, 2))
    output = model(x.to(DTYPES[precision]), t)
    output.float().square().mean().backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    free()
    return {"output": output.detach().float().cpu()} | found


def compare(
    reference: Callable[[], dict[str, Tensor]], shape: "BackboneConfig", device: str, precision: str, mode: str
) -> Outcome:
    """How far the output and the gradients are from those of float32 on the CPU."""
    exact, found = reference(), gradients(shape, device, precision, mode)
    if exact.keys() != found.keys():
        raise ValueError(f"gradients of other parameters: {sorted(exact.keys() ^ found.keys())[:3]}")
    names = [name for name in exact if name != "output"]
    by_name = {name: distance(found[name], exact[name]) for name in names}
    worst = max(names, key=by_name.__getitem__)
    full_gradient = distance(*(torch.cat([side[name].flatten() for name in names]) for side in (found, exact)))
    values: dict[str, float | str] = {
        "output": distance(found["output"], exact["output"]),
        "gradient": full_gradient,
        "worst tensor": by_name[worst],
        "its name": worst,
    }
    return judge(values, precision)


def distance(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-12))


def judge(values: dict[str, float | str], precision: str) -> Outcome:
    """An outcome with the limits of its precision."""
    output, gradient = LIMITS[precision]
    good = float(values["output"]) <= output and float(values["gradient"]) <= gradient
    return Outcome(values, good, f"output {output:g}, gradient {gradient:g}")


def compare_functions(shape: "BackboneConfig", device: str, precision: str) -> Outcome:
    """The network's own autograd functions against plain operations, both on the device.

    A layer with a hook computes by plain operations.
    """
    own, plain = (gradients(shape, device, precision, mode) for mode in ("eager", "plain"))
    names = [name for name in plain if name != "output"]
    gradient = distance(*(torch.cat([side[name].flatten() for name in names]) for side in (own, plain)))
    return judge({"output": distance(own["output"], plain["output"]), "gradient": gradient}, precision)


def compare_losses(device: str) -> Outcome:
    """The loss of every frame `(b f)`, variational term included, of the same estimate on both devices."""
    generator = torch.Generator().manual_seed(2)
    x_0, noise = (torch.randn(2, 8, 4, 8, 8, generator=generator) for _ in range(2))
    estimate = torch.randn(2, 8, 8, 8, 8, generator=generator)
    t = torch.randint(1, 1001, (2, 8), generator=generator)

    def losses(place: str) -> Tensor:
        def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return estimate.to(place)

        found = Diffusion().training_losses(model, x_0.to(place), t.to(place), None, noise.to(place))
        return found.double().cpu()

    found = distance(losses(device), losses("cpu"))
    return Outcome({"distance": found}, found < 1e-4, "1e-4")


def compare_samples(shape: "BackboneConfig", device: str) -> Outcome:
    """Eight seeds at once against each alone: the same noise to the last bit, the same clips but for rounding."""
    model = build(shape, device, "fp32").eval()
    schedule = full_sequence(steps=4, frames=shape.frames)
    size = shape.clip_shape
    noise = draw_noise((8, *size), generators(range(8)), torch.device(device))
    equal, errors = True, []
    with torch.no_grad():
        together = sample(model, noise, schedule, Diffusion())
        for k in range(8):
            alone = draw_noise((1, *size), generators([k]), torch.device(device))
            equal &= torch.equal(alone[0], noise[k])
            errors.append(distance(sample(model, alone, schedule, Diffusion())[0], together[k]))
    values = {"noise": "equal" if equal else "different", "largest distance": max(errors)}
    return Outcome(values, equal and max(errors) < 1e-3, "equal noise, distance 1e-3")


def find_syncs(shape: "BackboneConfig", device: str) -> Outcome:
    """The places at which a training step makes the host wait for the GPU, as `set_sync_debug_mode` sees them.

    Raises:
        LeftOutError: on a CPU, after the step.
    """
    from fvdm.distributed import from_environment
    from fvdm.training.config import EngineConfig
    from fvdm.training.ema import EMA
    from fvdm.training.engine import Engine, initialise

    ranks = from_environment()
    settings = EngineConfig(precision="bf16", grad_clip_start=0)
    place = initialise(settings.timeout)
    engine = Engine(build(shape, str(place), "fp32"), settings, ranks.world_size, ranks)
    ema, diffusion = EMA(engine.masters), Diffusion()
    x, t = (tensor.to(place) for tensor in clip(shape, 1))

    def step(number: int) -> None:
        engine.backward(diffusion.training_losses(engine, x, t, None).mean())
        engine.step(number, 10)
        ema.update()

    for number in range(2):  # The first steps allocate.
        step(number)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        step(2)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    engine.close()
    if device != "cuda":
        raise LeftOutError("the step has run, but only CUDA can say where a host waits")
    places = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    own = [name for name in places if Path(name).is_relative_to(ROOT / "fvdm")]
    values = {"syncs": sum(places.values()), "ours": len(own)}
    listed = [f"{short(name)} x{count}" for name, count in places.most_common()]
    return Outcome(values | {"places": listed}, not own, "none in fvdm/")


def short(name: str) -> str:
    """The end of a path that tells enough."""
    return "/".join(Path(name).parts[-3:])
