"""What decides the bytes of an encoding: made once from the settings, kept in the plan, and handed on in one piece."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from data_prep.config import EncodeConfig
from fvdm.media.clips import ClipSpec
from fvdm.media.layouts import PAPER
from fvdm.media.preprocess import Preprocess

if TYPE_CHECKING:
    from fvdm.media.text import TextEncoder
    from fvdm.media.vae import VAE


@dataclass(frozen=True)
class EncodeSpec:
    """All that decides which bytes are written; a run with another is refused.

    Attributes:
        format: 1 or 2, of the shards.
        vae_identity: hash of the VAE.
        read: which clips are read, and in which form.
        dtype: number type of the stored latents and embeddings.
        precision: number type of the VAE and the text encoder.
        shard_mb: bound on the size of a shard, in MB.
        captioned: captions are stored.
        text_identity: hash of the text encoder; empty without one.
        max_tokens: at which captions are cut.
    """

    format: int
    vae_identity: str
    read: ClipSpec
    dtype: str
    precision: str
    shard_mb: float
    captioned: bool = False
    text_identity: str = ""
    max_tokens: int = 0

    @property
    def flip(self) -> bool:
        """The flipped copies are stored."""
        return self.read.preprocess.flip

    def to_dict(self) -> dict[str, Any]:
        """The settings as the plan lists them, by name."""
        read = {name: value for name, value in asdict(self.read).items() if name not in ("frames", "every", "sizes")}
        written = {name: value for name, value in asdict(self).items() if name != "read"}
        if self.format == 1:
            names = ("vae_identity", "size", "preprocess", "dtype", "precision", "chunk", "shard_mb")
            values = written | read | {"size": self.read.sizes[0][0]}
            return {name: values[name] for name in names}
        clips = {"clip_frames": self.read.frames, "clip_every": self.read.every}
        return written | read | clips | {"sizes": [list(size) for size in self.read.sizes]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EncodeSpec":
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: something else than settings.
        """
        values = dict(values)
        values.setdefault("format", 1)
        if values["format"] == 1:
            values["sizes"] = [[values["size"], values["size"]]]
        read = {name: values[name] for name in ("sizes", "preprocess", "chunk")}
        read |= {name: values[name] for name in ("fps", "images") if name in values}
        read |= {"frames": values.get("clip_frames", 0), "every": values.get("clip_every", 0)}
        written = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**written, read=ClipSpec.from_dict(read))


def make_spec(config: EncodeConfig, layout: str, vae: "VAE", text: "TextEncoder | None") -> EncodeSpec:
    """What the settings ask for.

    Args:
        config: the settings, resolved.
        layout: the layout that was recognised, whose preprocessing is the default.
        vae: the encoder.
        text: the text encoder, if there is one.

    Raises:
        ValueError: settings that do not suit each other or the VAE.
    """
    needs = _needs_clips(config, vae)
    if config.format == 1 and needs:
        raise ValueError(f"--format 1 holds whole videos of square frames: leave out {needs}, or take --format 2.")
    form = config.format or (2 if needs else 1)
    assert config.chunk is not None
    return EncodeSpec(
        format=form,
        vae_identity=vae.identity,
        read=ClipSpec(
            sizes=_check_sizes(config, vae),
            preprocess=_preprocess(config, layout, form),
            chunk=config.chunk,
            frames=_check_clip(config, vae),
            every=config.clip_every or config.clip_frames or 0,
            fps=config.fps,
            images=config.images,
        ),
        dtype=config.dtype,
        precision=str(config.precision),
        shard_mb=config.shard_mb,
        captioned=config.captioned,
        text_identity=text.identity if text else "",
        max_tokens=config.max_tokens if text else 0,
    )


def _needs_clips(config: EncodeConfig, vae: "VAE") -> str:
    """What asks for format 2; empty if nothing does."""
    named = ("clip_frames", "fps", "buckets", "images", "captions", "text_encoder")
    found = [f"--{name.replace('_', '-')}" for name in named if getattr(config, name)]
    found += ["--size HxW"] if not config.buckets and config.sizes[0][0] != config.sizes[0][1] else []
    found += [f"the video VAE {config.vae!r}"] if vae.is_video else []
    return ", ".join(found)


def _preprocess(config: EncodeConfig, layout: str, form: int) -> Preprocess:
    """That of the layout, as far as no setting says otherwise; clips are not flipped unless asked, and antialiased."""
    base = PAPER[layout] if form == 1 else replace(PAPER[layout], flip=False, antialias=True)
    if config.clip_frames:
        base = replace(base, min_frames=config.clip_frames)
    given = {name: getattr(config, name) for name in ("resize", "antialias", "flip", "min_frames")}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(base, **given, keep_corrupt=config.keep_corrupt)


def _check_sizes(config: EncodeConfig, vae: "VAE") -> tuple[tuple[int, int], ...]:
    for h, w in config.sizes:
        if h % vae.factor or w % vae.factor:
            option = "--buckets" if config.buckets else "--size"
            size = config.size if isinstance(config.size, int) else f"{h}x{w}"
            raise ValueError(
                f"{option} {size} is no multiple of {vae.factor}, by which the VAE {config.vae!r} shrinks."
            )
    return config.sizes


def _check_clip(config: EncodeConfig, vae: "VAE") -> int:
    frames, stride = config.clip_frames or 0, vae.frame_map.stride
    if vae.is_video and not frames:
        raise ValueError(
            f"The VAE {config.vae!r} encodes clips, each from its own first frame: give --clip-frames, such as "
            f"--clip-frames {20 * stride + 1}."
        )
    if frames and not vae.frame_map.is_valid(frames):
        below = vae.frame_map.pixel_frames(vae.frame_map.latent_frames(frames))
        raise ValueError(
            f"--clip-frames {frames} leaves a latent frame of the VAE {config.vae!r} unfilled: it takes 1 frame and "
            f"{stride} more for each further latent, such as {below} or {below + stride}."
        )
    return frames
