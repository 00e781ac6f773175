"""Prompts as the network takes them: embeddings of a text encoder, padded with zeros to the length of training."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fvdm.media.text import TextEncoder, load_text_encoder

logger = logging.getLogger(__name__)
SHOWN = 60  # characters of a prompt in messages


class PromptEncoder:
    """Embeds prompts; loads the text encoder when the first one comes, and remembers what it has embedded.

    Attributes:
        name: of the text encoder, a folder or hub name.
        length: tokens l of an embedding; what is longer is cut.
        width: numbers e of a token, which the network takes.
        device: where the text encoder runs.
    """

    def __init__(self, name: str, length: int, width: int, device: torch.device) -> None:
        """Loads nothing yet."""
        self.name, self.length, self.width, self.device = name, length, width, device
        self._encoder: TextEncoder | None = None
        self._known: dict[str, Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, float32 `(b l e)` on the CPU; a warning says which one is cut.

        Raises:
            ValueError: if the text encoder is not known, cannot be loaded, or is of another width.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                self._known[prompt] = self._embed(prompt)
        return torch.stack([self._known[prompt] for prompt in prompts])

    def release(self) -> None:
        """Free the text encoder's memory; what it has embedded stays known."""
        self._encoder = None

    def _embed(self, prompt: str) -> Tensor:
        if self._encoder is None:
            self._encoder = self._load()
        if self._encoder.is_cut(prompt):
            shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
            logger.warning("the prompt %r is cut after %d tokens, as many as the model takes", shown, self.length)
        (embedding,) = self._encoder.encode([prompt])
        return F.pad(embedding, (0, 0, 0, self.length - len(embedding)))

    def _load(self) -> TextEncoder:
        if not self.name:
            raise ValueError(
                "the model does not say which text encoder it was trained with: name it with --text-encoder"
            )
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        encoder = load_text_encoder(self.name, self.device, dtype, self.length)
        if encoder.width != self.width:
            raise ValueError(
                f"the text encoder {self.name} gives {encoder.width} numbers a token, the model takes {self.width}: "
                f"name the one that it was trained with"
            )
        return encoder


def read_prompts(path: str) -> list[str]:
    """The prompts in a text file, one a line; empty lines are left out.

    Raises:
        ValueError: if the file cannot be read, or holds no prompt.
    """
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path}: {getattr(error, 'strerror', None) or error}") from None
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts
