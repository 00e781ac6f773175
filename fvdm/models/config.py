"""Settings of the backbones, and what can be counted from them alone. No torch here, so that `--help` is instant."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

from fvdm.config import in_range

Backend = Literal["auto", "flash", "sdpa", "math", "blockwise"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True)
class BackboneConfig:
    """What every backbone's settings say of it: the shape of its clips, and what a training step costs.

    Attributes:
        backbone: name of the backbone, as `fvdm.models.build` knows it.
        objective: the one objective that it can be trained with; empty where it can with any.
        spacing: of the timesteps that suits it in sampling; empty where the solver's own does.
        depth: number of blocks.
        frames: latent frames f of the longest clip.
        learned_variance: predict the reverse variance too, as c more channels.
        attention: attention backend: auto, flash, sdpa or math.
        activation_checkpointing: recompute the activations of every k-th block in the backward pass to save
            memory; 0 is none.
    """

    backbone: ClassVar[str]
    objective: ClassVar[str] = ""
    spacing: ClassVar[str] = ""

    depth: int = 28
    frames: int = 16
    learned_variance: bool = True
    attention: Backend = "auto"
    activation_checkpointing: int = 0

    @property
    def patch(self) -> int:
        """Side of a patch, which becomes a token, in latent pixels."""
        raise NotImplementedError

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width `(c, h, w)` of a latent frame."""
        raise NotImplementedError

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """The shape `(f, c, h, w)` of the longest clip."""
        return (self.frames, *self.latent_shape)

    @property
    def classes(self) -> int:
        """Number of class labels; 0 where the condition is another, or there is none."""
        return 0

    @property
    def text_width(self) -> int:
        """Channels e of the text embeddings `y (b l e)` that it takes; 0 where it takes no text."""
        return 0

    @property
    def text_length(self) -> int:
        """Tokens l to which texts are padded; 0 where it takes no text."""
        return 0

    @property
    def source(self) -> str:
        """Folder or hub name of its pretrained weights; empty without."""
        return ""

    @property
    def conditional(self) -> bool:
        """Whether the network takes a condition `y`."""
        return self.classes > 0

    @property
    def tokens(self) -> int:
        """Tokens of the longest clip."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Numbers d that a block takes and returns for each token."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """Attention heads."""
        raise NotImplementedError

    def summary(self) -> str:
        """The network's size in words."""
        return f"{self.depth} blocks of width {self.width}, {self.heads} heads, patches of {self.patch}"

    def block_bytes(self, number_size: int) -> int:
        """Bytes for each token that a block keeps for its backward pass, with numbers of `number_size` bytes."""
        raise NotImplementedError

    def forward_flops(self) -> float:
        """Floating-point operations of the matrix products of one forward pass of the longest clip."""
        raise NotImplementedError

    def fit(
        self, latent_shape: tuple[int, int, int], frames: int, classes: int = 0, learned_variance: bool = True
    ) -> Self:
        """The same network for clips of this shape.

        Args:
            latent_shape: `(c, h, w)`.
            frames: latent frames of the longest clip.
            classes: class labels; 0 without.
            learned_variance: whether the objective trains the variance.

        Raises:
            ValueError: if the backbone cannot take such clips.
        """
        raise NotImplementedError

    def fit_text(self, width: int, length: int) -> Self:
        """The same network for texts of this shape.

        Args:
            width: channels e of the embeddings `(b l e)`.
            length: tokens l to which they are padded.

        Raises:
            ValueError: if the backbone takes no such texts.
        """
        raise ValueError(f"the backbone {self.backbone} takes no text")


@dataclass(frozen=True)
class LatteConfig(BackboneConfig):
    """Shape of the network. The defaults are Latte-XL/2 on 256-pixel clips of 16 frames.

    Attributes:
        depth: number of blocks; even ones attend over space, odd ones over time.
        width: channels d of a token.
        heads: attention heads.
        patch: side of a patch in latent pixels.
        channels: latent channels c.
        size: height and width of the latent frame; one number is a square.
        num_classes: class labels; 0 is an unconditional model.
    """

    backbone: ClassVar[str] = "latte"

    width: int = 1152
    heads: int = 16
    patch: int = 2
    channels: int = 4
    size: int | tuple[int, int] = 32
    num_classes: int = 0

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit together."""
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth {self.depth} must be even: blocks come in pairs, space and time")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 and of the {self.heads} heads")
        sides = [self.size] if isinstance(self.size, int) else list(self.size)
        # A square has one spelling, so that settings compare equal however they were written.
        object.__setattr__(self, "size", sides[0] if len({*sides}) == 1 else tuple(sides))
        _, height, width = self.latent_shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"patches of {self.patch} do not tile latent frames of {height} x {width}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width `(c, h, w)` of a latent frame."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return self.channels, height, width

    @property
    def classes(self) -> int:
        """Number of class labels; 0 is an unconditional model."""
        return self.num_classes

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        _, height, width = self.latent_shape
        return height // self.patch, width // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of the longest clip."""
        rows, columns = self.grid
        return self.frames * rows * columns

    def block_bytes(self, number_size: int) -> int:
        """Bytes for each token that a block keeps for its backward pass, with numbers of `number_size` bytes.

        A block keeps 16 d numbers: for attention the residual, q, k, v, the attended and the projected tokens (6 d);
        for the MLP the residual, the hidden layer before and after GELU, and its output (10 d). Attention also keeps
        a float32 for each head.
        """
        return 16 * self.width * number_size + 4 * self.heads

    def forward_flops(self) -> float:
        """Floating-point operations of the matrix products of one forward pass of the longest clip.

        A block does 24 d^2 for each token, attention 4 n d for each token among n, modulation 12 d^2 for each frame.
        """
        d, f = self.width, self.frames
        n = self.tokens // f
        space = f * n * (24 * d * d + 4 * n * d) + f * 12 * d * d
        time = f * n * (24 * d * d + 4 * f * d) + f * 12 * d * d
        patch = 2 * f * n * d * self.channels * self.patch**2
        ends = patch * (1 + 1 + self.learned_variance) + f * (2 * 256 * d + 2 * d * d + 4 * d * d)
        return self.depth / 2 * (space + time) + ends

    def fit(
        self, latent_shape: tuple[int, int, int], frames: int, classes: int = 0, learned_variance: bool = True
    ) -> "LatteConfig":
        """The same network for clips of this shape; see `BackboneConfig.fit`."""
        c, *size = latent_shape
        return replace(
            self,
            channels=c,
            size=(size[0], size[1]),
            frames=frames,
            num_classes=classes,
            learned_variance=learned_variance,
        )


LATTE_SIZES = {  # name: depth, width, heads (Latte, table 1; T, XS and XS12 are ours, for tests and small experiments)
    "T": (2, 64, 2),
    "XS": (6, 192, 3),
    "XS12": (12, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
LATTE_PATCHES = (1, 2, 4, 8)


def latte_preset(name: str) -> LatteConfig:
    """The configuration of a named size, such as `XL/2`: the size XL with patches of 2.

    Raises:
        ValueError: if there is no such size; lists those there are.
    """
    size, _, patch = name.partition("/")
    if size not in LATTE_SIZES or patch not in map(str, LATTE_PATCHES):
        names = ", ".join(f"{each}/2" for each in LATTE_SIZES)
        raise ValueError(f"model {name!r} is unknown; choose one of {names} (or with patches /1, /4, /8)")
    depth, width, heads = LATTE_SIZES[size]
    return replace(LatteConfig(), depth=depth, width=width, heads=heads, patch=int(patch))


def to_dict(config: BackboneConfig) -> dict[str, Any]:
    """Settings as plain values that `fvdm.models.config_from` reads, for checkpoints."""
    from fvdm.config import plain

    return {"backbone": config.backbone} | plain(config)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021): train low-rank updates of linear layers, and leave the network itself as it is.

    Attributes:
        rank: rank r of the updates B A; 0 trains the whole network.
        alpha: the updates are multiplied by alpha / rank; 0 is the rank, so by 1.
        targets: names, or ends of names, of the linear layers that get one, such as to_q to_v ffn.net.2; empty is all
            linear layers of the blocks.
        dropout: probability that a number that goes into an update is set to zero in training.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        in_range(self, "lora", rank=(0, math.inf), alpha=(0, math.inf), dropout=(0, 1))

    @property
    def scale(self) -> float:
        """What the updates are multiplied by."""
        return (self.alpha or self.rank) / self.rank
