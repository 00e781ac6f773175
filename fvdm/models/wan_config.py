"""Settings of the Wan transformer, and their form in a `config.json` of diffusers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fvdm.models.config import BackboneConfig

DIFFUSERS_CLASS = "WanTransformer3DModel"
OWN = "_fvdm"  # our settings in config.json; diffusers leaves out what begins with an underscore
# Names of diffusers -> ours.
_NAMES = {
    "num_layers": "depth",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_width",
    "in_channels": "channels",
    "text_dim": "text_width",
    "freq_dim": "frequencies",
    "ffn_dim": "hidden",
    "cross_attn_norm": "cross_norm",
    "rope_max_seq_len": "positions",
}
# What only other variants of the network have, and the value that ours has.
_FIXED = {
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


@dataclass(frozen=True)
class WanConfig(BackboneConfig):
    """Shape of the network. The defaults are Wan 2.1 T2V 1.3B on 81 pixel frames of 480 x 832.

    Attributes:
        depth: number of blocks.
        frames: latent frames f of the longest clip.
        learned_variance: always false: the network estimates a velocity.
        heads: attention heads.
        head_width: channels of a head; the token's width d is heads x head_width.
        hidden: width of the feed-forward network.
        channels: latent channels c.
        text_width: channels e of the text embeddings.
        frequencies: sinusoids of a timestep.
        patch: side of a patch in latent pixels.
        cross_norm: whether the attention to the text has a norm.
        positions: largest number of frames, rows or columns of tokens.
        size: height and width of the latent frame; a setting of the plan, as the network takes any.
        text_length: tokens l of a text; a setting of the plan, as the network takes any.
        source: folder or hub name of the pretrained weights; empty for new ones.
    """

    backbone: ClassVar[str] = "wan"
    objective: ClassVar[str] = "flow"
    spacing: ClassVar[str] = "shift"

    depth: int = 30
    frames: int = 21
    learned_variance: bool = False
    heads: int = 12
    head_width: int = 128
    hidden: int = 8960
    channels: int = 16
    text_width: int = 4096
    frequencies: int = 256
    patch: int = 2
    cross_norm: bool = True
    positions: int = 1024
    size: tuple[int, int] = (60, 104)
    text_length: int = 512
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit together."""
        if self.learned_variance:
            raise ValueError(
                "Wan estimates a velocity and no variance: set diffusion.objective to flow and "
                "diffusion.learned_variance to false"
            )
        if self.size[0] % self.patch or self.size[1] % self.patch:
            raise ValueError(f"patches of {self.patch} do not tile latent frames of {self.size[0]} x {self.size[1]}")

    @property
    def width(self) -> int:
        """Numbers d that a block takes and returns for each token."""
        return self.heads * self.head_width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width `(c, h, w)` of a latent frame."""
        return (self.channels, *self.size)

    @property
    def conditional(self) -> bool:
        """It always takes a text."""
        return True

    @property
    def tokens(self) -> int:
        """Tokens of the longest clip."""
        return self.frames * (self.size[0] // self.patch) * (self.size[1] // self.patch)

    def block_bytes(self, number_size: int) -> int:
        """Bytes for each token that a block keeps for its backward pass, with numbers of `number_size` bytes.

        Attention over the clip keeps 11 d numbers: the residual, its norm, the modulated tokens, q and k before and
        after their norm and turned, v and the attended tokens, and the projected ones; attention to the text 6 d; the
        feed-forward network the residual, its output and twice its hidden layer. Each attention also keeps a float32
        for each head.
        """
        return (19 * self.width + 2 * self.hidden) * number_size + 8 * self.heads

    def forward_flops(self) -> float:
        """Floating-point operations of the matrix products of one forward pass of the longest clip.

        A block does 8 d^2 for each token in the attention over the clip and 4 d^2 in that to the text, 4 d for each
        pair of tokens, and 4 d times the hidden width; each text token costs it 4 d^2.
        """
        d, n, text = self.width, self.tokens, self.text_length
        block = n * (12 * d * d + 4 * d * (n + text) + 4 * d * self.hidden) + 4 * d * d * text
        embeddings = self.frames * 2 * d * (self.frequencies + d + 6 * d) + text * 2 * d * (self.text_width + d)
        return self.depth * block + embeddings + 4 * n * d * self.channels * self.patch**2

    def fit(
        self, latent_shape: tuple[int, int, int], frames: int, classes: int = 0, learned_variance: bool = False
    ) -> "WanConfig":
        """The same network for clips of this shape; see `BackboneConfig.fit`."""
        c, height, width = latent_shape
        if c != self.channels:
            raise ValueError(f"the model takes latents of {self.channels} channels, the data have {c}: use its own VAE")
        if classes:
            raise ValueError("Wan takes texts, not class labels: leave conditional out")
        return replace(self, size=(height, width), frames=frames, learned_variance=learned_variance)

    def fit_text(self, width: int, length: int) -> "WanConfig":
        """The same network for texts of this shape; see `BackboneConfig.fit_text`."""
        if width != self.text_width:
            raise ValueError(
                f"the model takes text embeddings of {self.text_width} numbers a token, those here have {width}: use "
                f"the model's own text encoder"
            )
        return replace(self, text_length=length)


# Published transformers by hub name; what their config.json says, so that a plan needs no network.
PUBLISHED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": WanConfig(),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": WanConfig(depth=40, heads=40, hidden=13824),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": WanConfig(heads=24, hidden=14336, channels=48, frames=31, size=(44, 80)),
}
# The same by size, with new weights.
SIZES = dict(zip(("1.3B", "14B", "5B"), PUBLISHED.values(), strict=True))


def from_diffusers(values: Mapping[str, Any], source: str = "") -> WanConfig:
    """The settings of a `config.json` of diffusers.

    Args:
        values: the file's content.
        source: its folder or hub name.

    Raises:
        ValueError: if it is of another network, or of a variant that takes images.
    """
    found = values.get("_class_name")
    if found != DIFFUSERS_CLASS:
        raise ValueError(f"{source or 'config.json'} holds a {found}, not a {DIFFUSERS_CLASS}")
    patch = tuple(values.get("patch_size", (1, 2, 2)))
    fixed = {name: values[name] for name, value in _FIXED.items() if values.get(name, value) != value}
    if fixed or patch[0] != 1 or patch[1] != patch[2] or values.get("out_channels") != values.get("in_channels"):
        raise ValueError(
            f"{source or 'config.json'} is a variant of {DIFFUSERS_CLASS} that is not supported "
            f"({fixed or patch}): only text to video is"
        )
    ours: dict[str, Any] = {own: values[name] for name, own in _NAMES.items() if name in values}
    ours |= {key: tuple(value) if isinstance(value, list) else value for key, value in values.get(OWN, {}).items()}
    return WanConfig(**ours, patch=patch[1], source=source)


def to_diffusers(config: WanConfig) -> dict[str, Any]:
    """The `config.json` that diffusers reads, with the clip's shape in a field that it leaves alone."""
    theirs = {name: getattr(config, own) for name, own in _NAMES.items()}
    own = {"frames": config.frames, "size": list(config.size), "text_length": config.text_length}
    patch = [1, config.patch, config.patch]
    return (
        {"_class_name": DIFFUSERS_CLASS, **theirs, "out_channels": config.channels, "patch_size": patch}
        | _FIXED
        | {OWN: own}
    )
