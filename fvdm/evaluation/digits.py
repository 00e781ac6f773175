"""Moving digits: where a digit is in a video, how far that is from a possible path, and which digit it is."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DARK = 48  # brightness, 0 to 255, below which a pixel is no digit but what the VAE leaves of black
KINDS = 10  # of digits
EPOCHS = 3  # of the classifier


def centres(video: Tensor) -> np.ndarray:
    """Centre of brightness of every frame, float64 `(b f 2)`, x and y in pixels; the middle where all is dark.

    Args:
        video: uint8 `(b f 3 h w)`.
    """
    light = (video.double().mean(dim=2) - DARK).clamp(min=0)  # (b f h w)
    total = light.sum(dim=(2, 3))
    found = []
    for axis, other in ((3, 2), (2, 3)):
        places = torch.arange(video.shape[axis + 1], dtype=torch.float64) + 0.5
        mean = (light.sum(dim=other) * places).sum(dim=2) / total
        found.append(torch.where(total > 0, mean, video.shape[axis + 1] / 2))
    return torch.stack(found, dim=2).numpy()


def distance_from_path(where: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How far each centre is from where the digit truly was, float64 `(b f)`, in pixels; both `(b f 2)`."""
    return np.linalg.norm(where - truth, axis=2)


def path_residual(where: np.ndarray, size: int, frames_across: tuple[int, int]) -> np.ndarray:
    """How far a digit is from the nearest path that it could have flown, float64 `(b)`: root mean square, in pixels.

    Such a path is straight, of one speed between those of the slowest and the fastest digit, and bounces off the walls:
    each axis is a triangle wave. All starts and speeds are tried, on a grid so fine that a perfect path leaves a tenth
    of a pixel or two. A digit that stands still has flown no such path, but is nearer to a slow one than a digit that
    flies astray: the residual rewards standing still, so a frozen frame belongs beside it.

    Args:
        where: centres `(b f 2)`.
        size: side of the image, of which the digit takes half.
        frames_across: in how many frames the slowest and the fastest digit cross that side.
    """
    room, frames = size / 2, where.shape[1]
    slowest, fastest = (size / divisor for divisor in frames_across)
    starts = np.arange(0, 2 * room, 0.5)
    speeds = np.linspace(0, fastest, 61)
    straight = starts[:, None, None] + speeds[:, None] * np.arange(frames)  # (starts speeds f)
    waves = (room - np.abs(straight % (2 * room) - room)).reshape(-1, frames)
    errors = []
    for axis in range(2):
        path = where[:, :, axis] - size / 4
        each = (path**2).sum(1)[:, None] - 2 * path @ waves.T + (waves**2).sum(1)
        errors.append(each.reshape(len(where), len(starts), -1).min(axis=1))  # (b speeds)
    together = errors[0][:, :, None] + errors[1][:, None, :]
    speed = np.hypot(speeds[:, None], speeds[None])
    together[:, (speed < 0.95 * slowest) | (speed > 1.05 * fastest)] = np.inf
    return np.sqrt(together.min(axis=(1, 2)).clip(0) / frames)


def straight_line(truth: Tensor, given: Sequence[int]) -> Tensor:
    """Clips in which the digit flies on in a straight line: what a model must beat that is given two frames or more.

    The digit is that of the nearest given frame before. Between two given frames it flies from one to the other; after
    the last it keeps the velocity between the last two, and stops where it meets a wall.

    Args:
        truth: uint8 `(b f 3 h w)`, of which only the given frames are looked at.
        given: numbers of those frames, in order; at least two.

    Returns:
        uint8 of the same shape; the given frames are as they were.

    Raises:
        ValueError: if fewer than two frames are given.
    """
    if len(given) < 2:
        raise ValueError(f"{len(given)} frames are given: a straight line needs two")
    size, where = truth.shape[-1], centres(truth[:, list(given)])
    made = truth.clone()
    for frame in range(truth.shape[1]):
        if frame in given:
            continue
        before = max((k for k, g in enumerate(given) if g < frame), default=0)
        start = min(before, len(given) - 2)  # of the two given frames that the line goes through
        velocity = (where[:, start + 1] - where[:, start]) / (given[start + 1] - given[start])
        place = where[:, before] + velocity * (frame - given[before])
        place = place.clip(size / 4, size * 3 / 4)  # The digit takes half of the side.
        made[:, frame] = _shift(truth[:, given[before]], place - where[:, before])
    return made


def _shift(frames: Tensor, by: np.ndarray) -> Tensor:
    """Frames `(b c h w)`, uint8, moved by so many pixels `(b 2)`, x and y; what comes in is black."""
    theta = torch.eye(2, 3).repeat(len(frames), 1, 1)
    theta[:, :, 2] = -torch.from_numpy(by).float() * 2 / torch.tensor([frames.shape[-1], frames.shape[-2]])
    grid = F.affine_grid(theta, list(frames.shape), align_corners=False)
    moved = F.grid_sample(frames.float(), grid, align_corners=False)
    return moved.round().clamp(0, 255).byte()


class DigitClassifier(nn.Sequential):
    """A small convolutional network: digits cut out of their frames `(n 1 s s)`, 0 to 1, to logits `(n 10)`."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(3),
            nn.Flatten(),
            nn.Linear(64 * 9, KINDS),
        )


def train_classifier(images: Tensor, labels: Tensor, size: int, epochs: int = EPOCHS) -> tuple[DigitClassifier, float]:
    """Train a classifier of digits as they look in frames, and test it on a tenth of the digits, kept apart.

    Args:
        images: digits, float32 `(n 28 28)`, 0 to 1; none of those whose videos are to be judged.
        labels: which digit each is, `(n)`, 0 to 9.
        size: side of the frames, of which a digit takes half.
        epochs: passes over the digits.

    Returns:
        The network, and the share of the tenth that it names right.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    tested, trained = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    small = F.interpolate(images[:, None], size=(size // 2, size // 2), mode="area")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitClassifier()
    steps = epochs * -(-len(trained) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in trained[torch.randperm(len(trained), generator=generator)].split(64):
            seen = _cut_out(_in_frames(small[rows], size, generator))
            # A generated digit is never as clean as a real one.
            seen = seen + 0.1 * torch.randn(seen.shape, generator=generator)
            loss = F.cross_entropy(net(seen), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval().requires_grad_(False)
    right = net(_cut_out(_in_frames(small[tested], size, generator))).argmax(1) == labels[tested]
    return net, float(right.float().mean())


def name_digits(net: DigitClassifier, video: Tensor) -> np.ndarray:
    """How sure the classifier is of each digit in each frame, float32 `(b f 10)`; the ten sum to 1.

    Args:
        net: the classifier.
        video: uint8 `(b f 3 h w)`.
    """
    with torch.no_grad():
        return net(_cut_out(video.flatten(0, 1))).softmax(1).unflatten(0, video.shape[:2]).numpy()


def identity(names: np.ndarray) -> np.ndarray:
    """Share of the frames that show the clip's commonest digit, float64 `(b)`, of their names `(b f)`."""
    return np.array([np.bincount(each).max() / len(each) for each in names])


def _in_frames(small: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Digits `(n 1 s s)` at random places of black frames, uint8 `(n 3 size size)`."""
    margin = (size - small.shape[-1]) // 2
    frames = F.pad(small, (margin,) * 4).expand(-1, 3, -1, -1) * 255
    by = (torch.rand((len(small), 2), generator=generator) * 2 - 1) * margin
    return _shift(frames.byte(), by.double().numpy())


def _cut_out(frames: Tensor) -> Tensor:
    """The digit in the middle of a square of its side and a little more, float32 `(n 1 s s)`, 0 to 1."""
    size = frames.shape[-1]
    side = size // 2 + 4
    moved = _shift(frames, size / 2 - centres(frames[:, None])[:, 0])
    first = (size - side) // 2
    return moved[:, :, first : first + side, first : first + side].float().mean(1, keepdim=True) / 255
