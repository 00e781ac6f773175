"""Tiny random models in the folders that their libraries save: a causal VAE, a text encoder with its tokenizer, Wan.

They have the form of the published ones and no knowledge. `python -m tests.tiny_models FOLDER` makes all of them in
the layout of a diffusers pipeline: FOLDER/vae, FOLDER/text_encoder, FOLDER/tokenizer, FOLDER/transformer.
"""

import sys
from pathlib import Path
from typing import Any

import torch

CHANNELS, WIDTH = 4, 16  # of a latent, and of one token's embedding
CORPUS = (
    "a talking man in front of a grey wall",
    "a red car drives along the street, seen from above",
    "waves roll onto a beach at night; the camera stands still",
    "two people walk a dog in the snow",
)


def tiny_wan_vae(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An AutoencoderKLWan: 4 channels, 8 x smaller, 4 pixel frames per latent frame, unless its `settings` differ."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    tiny: dict[str, Any] = {
        "base_dim": 3,
        "z_dim": CHANNELS,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [0.5, 0.7, 0.9, 1.1],
    }
    model: Any = AutoencoderKLWan(**tiny | settings)
    model.save_pretrained(folder)
    return folder


def tiny_text_encoder(folder: Path, kind: str = "umt5", seed: int = 0) -> Path:
    """A UMT5 (or `t5`) encoder of width 16, and a tokenizer made from `CORPUS`, in one folder."""
    import transformers

    tokenizer = tiny_tokenizer(folder)
    config, model = {
        "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
        "t5": (transformers.T5Config, transformers.T5EncoderModel),
    }[kind]
    torch.manual_seed(seed)
    made = model(
        config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    made.save_pretrained(folder)
    return folder


def tiny_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    """A unigram tokenizer of the words and letters of `CORPUS` that ends each text with `</s>`, as T5's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {f"▁{word}" for text in CORPUS for word in text.split()}
    letters = {letter for word in words for letter in word}
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = [(token, 0.0) for token in special]
    vocabulary += [(token, -2.0 if len(token) > 1 else -4.0) for token in sorted(words | letters)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)
    return fast


def tiny_wan(folder: Path, seed: int = 0) -> Path:
    """A WanTransformer3DModel of two blocks for the latents and embeddings of the others."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    model.save_pretrained(folder)
    return folder


def tiny_wan_run(root: Path, pipeline: Path, clip: tuple[int, int, int, int], tokens: int) -> Path:
    """A run of an untrained Wan of `pipeline` for clips `(f c h w)` and so many tokens, saved by the real code."""
    from fvdm import config as settings
    from fvdm.checkpoints.layout import SLICES, group_key
    from fvdm.checkpoints.save import save
    from fvdm.models import build, preset
    from fvdm.models.config import to_dict
    from fvdm.training.config import TrainConfig
    from tests.latte import randomised

    frames, *latent_shape = clip
    network = preset(f"wan:{pipeline}").fit(tuple(latent_shape), frames).fit_text(WIDTH, tokens)
    model = randomised(build(network))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    words = ["--name", "r", "--data.path", "p", "--diffusion.objective", "flow"]
    config = settings.parse(TrainConfig, [*words, "--diffusion.learned_variance", "false"])
    state = {
        "names": {name: list(p.shape) for name, p in model.named_parameters()},
        "settings": settings.plain(config),
        "network": to_dict(network),
        "vae": str(pipeline / "vae"),
        "classes": [],
        "text": {"name": str(pipeline), "identity": "0", "width": WIDTH, "max_tokens": tokens},
        "size": latent_shape[1] * 8,
    }
    save(root / "checkpoints", 5, {group_key(name, 0): flat.clone() for name in SLICES}, [0], state, 0, 1, lambda: None)
    return root


def tiny_pipeline(folder: Path) -> Path:
    """All of them, in the layout of a diffusers pipeline."""
    tiny_wan_vae(folder / "vae")
    tiny_wan(folder / "transformer")
    tiny_text_encoder(folder / "text_encoder")
    tiny_tokenizer(folder / "tokenizer")
    for path in folder.glob("text_encoder/*token*"):
        path.unlink()
    return folder


if __name__ == "__main__":
    print(tiny_pipeline(Path(sys.argv[1])))
