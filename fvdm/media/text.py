"""Frozen text encoders: captions to embeddings, and the one place that loads them."""

import hashlib
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvdm.hub import fetching

MAX_TOKENS = 512  # as Wan
KINDS = {"umt5": "UMT5EncoderModel", "t5": "T5EncoderModel"}


def clean(text: str) -> str:
    """A caption as it is tokenized: HTML entities resolved, each run of white space one space (as diffusers' Wan)."""
    return " ".join(html.unescape(html.unescape(text)).split())


class TextEncoder:
    """A frozen T5 or UMT5 with its tokenizer.

    Attributes:
        name: what it was loaded by.
        identity: hash of its weights and its tokenizer; shards remember it.
        width: numbers of one token's embedding, e.
        max_tokens: at which captions are cut.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, max_tokens: int = MAX_TOKENS) -> None:
        """Takes a loaded encoder of `transformers`, on its device and in its precision, and its tokenizer."""
        self.name = name
        self.identity = _identity(model, tokenizer)
        self.width = int(model.config.d_model)
        self.max_tokens = max_tokens
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """The embedding of each caption, as Wan's pipeline in diffusers makes it, without the zeros that pad it.

        Captions go through the encoder one by one, so that an embedding does not depend on what comes beside it.

        Args:
            captions: texts; "" is the empty prompt. Each is cut at `max_tokens`.

        Returns:
            float32 (n e) each, on the CPU; n counts its tokens, among them the mark of the end.
        """
        found = []
        for caption in captions:
            ids = self._ids(caption, truncation=True).to(self.model.device)
            hidden = self.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            found.append(hidden[0].float().cpu())
        return found

    def is_cut(self, caption: str) -> bool:
        """Whether a caption has more than `max_tokens` tokens."""
        return self._ids(caption, truncation=False).shape[1] > self.max_tokens

    def _ids(self, caption: str, *, truncation: bool) -> Tensor:
        limit = {"max_length": self.max_tokens} if truncation else {}
        given = self.tokenizer(clean(caption), truncation=truncation, return_tensors="pt", verbose=False, **limit)
        return torch.as_tensor(given.input_ids)


def load_text_encoder(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_tokens: int = MAX_TOKENS,
) -> TextEncoder:
    """Load a text encoder with its tokenizer.

    Args:
        name: a folder with both, or a diffusers pipeline's folder that holds `text_encoder` and `tokenizer`; or a name
            on the hub, such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers/text_encoder` of a pipeline.
        device: where it runs.
        dtype: in which precision.
        max_tokens: at which captions are cut, >= 1.

    Raises:
        ValueError: `transformers` is not installed, there is no such encoder, it is of another kind than T5 and UMT5,
            it cannot be read, or its files lack some of its weights.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "text encoders need the package transformers, which is not installed: type pip install 'fvdm[text]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        source, model_at, tokenizer_at = _source(name)
        kind = transformers.AutoConfig.from_pretrained(source, **model_at).model_type
        if kind not in KINDS:
            raise ValueError(f"it is of the kind {kind!r}; those known are {', '.join(KINDS)}")
        with fetching(name):
            model, info = getattr(transformers, KINDS[kind]).from_pretrained(
                source, use_safetensors=True, output_loading_info=True, dtype="auto", **model_at
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"its files lack {len(missing)} weights, for example {missing[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **tokenizer_at)
        encoder = TextEncoder(name, model, tokenizer, max_tokens)
        encoder.model.to(device, dtype)
        return encoder
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"cannot load the text encoder {name!r}: give a folder with the encoder (config.json and safetensors) and "
            f"its tokenizer, a folder of a diffusers pipeline, or a name on the hub such as "
            f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers/text_encoder ({reason})"
        ) from None


def _source(name: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """The folder or the hub's name, and where in it the encoder and its tokenizer are.

    Raises:
        ValueError: it is no folder, and not of the form owner/name or owner/name/text_encoder.
    """
    pipeline = {"subfolder": "text_encoder"}, {"subfolder": "tokenizer"}
    folder = Path(name)
    if name and folder.is_dir():
        if (folder / "text_encoder").is_dir():
            return name, *pipeline
        if not list(folder.glob("tokenizer*")) and (folder.parent / "tokenizer").is_dir():
            return str(folder.parent), {"subfolder": folder.name}, {"subfolder": "tokenizer"}
        return name, {}, {}
    parts = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(/text_encoder)?", name)
    if not parts:
        raise ValueError("there is no such folder")
    return (parts[1], *pipeline) if parts[2] else (parts[1], {}, {})


def _identity(model: Any, tokenizer: Any) -> str:
    """Hash of what decides the embeddings: the weights as they were loaded, and the tokenizer."""
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"
