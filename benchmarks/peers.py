"""The networks of diffusers that ours are timed beside, called as ours are."""

from typing import Any

import torch
from torch import Tensor, nn

from fvdm.models.config import BackboneConfig
from fvdm.models.loading import build


class DiffusersLatte(nn.Module):
    """diffusers' Latte transformer: one timestep a clip, as it has no more."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, channels: int, size: int, frames: int) -> None:
        super().__init__()
        from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel

        self.net: Any = LatteTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=depth // 2,
            sample_size=size,
            patch_size=patch,
            norm_type="ada_norm_single",
            caption_channels=8,
            video_length=frames,
            activation_fn="gelu-approximate",
            attention_bias=True,
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """`x (b f c h w)`, `t (b f)`, of which the first frame's is taken, `-> (b f 2c h w)`."""
        nothing = torch.zeros(len(x), 1, 8, dtype=x.dtype, device=x.device)
        out = self.net(x.transpose(1, 2), timestep=t[:, 0], encoder_hidden_states=nothing, return_dict=False)[0]
        return out.transpose(1, 2)


class DiffusersWan(nn.Module):
    """diffusers' Wan transformer: a timestep per frame in its form for one per token."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            described = build(config).config_dict()
        values = {name: value for name, value in described.items() if not name.startswith("_")}
        self.net: Any = WanTransformer3DModel(**values)
        self.patch = values["patch_size"][1]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """`x (b f c h w)`, `t (b f)`, `y (b l e)` `-> (b f c h w)`."""
        tokens = (x.shape[3] // self.patch) * (x.shape[4] // self.patch)
        dtype = self.net.proj_out.weight.dtype
        per_token = t.repeat_interleave(tokens, dim=1)
        out = self.net(x.to(dtype).transpose(1, 2), per_token, y.to(dtype), return_dict=False)[0]
        return out.transpose(1, 2)
