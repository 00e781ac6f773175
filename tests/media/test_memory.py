"""What a process keeps: freed memory where it is told to, and of a step what the backward pass needs."""

import ctypes
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fvdm.models import preset
from fvdm.models.latte import Latte
from fvdm.models.layers import ModulatedLinear, modulated

PROGRAM = """
import resource, sys, torch
from fvdm.media.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults(times):
    for _ in range(times):
        torch.zeros(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults(64)  # Freed memory grows to a place where the next tensor, aligned, fits.
print(faults(32) - first)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_is_kept_is_not_cleared_again():
    faults = [
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, check=True).stdout)
        for how in ("no", "keep")
    ]
    assert faults[1] < faults[0] / 4


def plain(layer, x, shift, scale):
    return layer(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def test_modulation_has_the_gradients_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 1, 8), (2, 3, 1, 8), (4, 8), (4,))
    x, shift, scale, weight, bias = inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes
    ]
    expected = plain(lambda z: F.linear(z, weight, bias), x, shift, scale)
    torch.testing.assert_close(ModulatedLinear.apply(*inputs), expected)
    assert torch.autograd.gradcheck(ModulatedLinear.apply, inputs)


class Adapted(nn.Linear):
    """As an adapter of low rank wraps a layer."""

    def forward(self, x):
        return super().forward(x) + x[..., :4]


@pytest.mark.parametrize("kind", ["adapter", "hook", "backward hook", "autocast"])
def test_what_wraps_a_layer_or_looks_into_it_is_heard(kind):
    layer, seen = (Adapted if kind == "adapter" else nn.Linear)(8, 4), []
    if kind == "hook":
        layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    if kind == "backward hook":
        layer.register_full_backward_hook(lambda module, to_inputs, to_outputs: seen.append(to_outputs[0]))
    x, shift, scale = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        out = modulated(layer, x, shift, scale)
        expected = plain(layer, x, shift, scale)
        out.float().sum().backward()
    torch.testing.assert_close(out, expected)
    assert (out.dtype == torch.bfloat16) == (kind == "autocast")
    assert layer.weight.grad.dtype == torch.float32
    assert len(seen) == {"hook": 2, "backward hook": 1}.get(kind, 0)
    if kind == "hook":
        torch.testing.assert_close(*seen)


def test_a_block_keeps_sixteen_numbers_a_channel_for_the_backward_pass():
    """Of a token: the block's input, q, k, v, attention's output, the state between attention and MLP, what each gate
    scales, and the MLP's four times as wide hidden layer before and after its activation."""
    config = preset("T/2")
    model, (frames, size) = Latte(config).blocks[1], (16, 256)
    x, c = torch.randn(1, frames, size, config.width, requires_grad=True), torch.randn(1, frames, config.width)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, c)
    bytes_ = sum(z.untyped_storage().nbytes() for place, z in kept.items() if place not in weights)
    assert 16 <= bytes_ / (4 * x.numel()) < 16.5
