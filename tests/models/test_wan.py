"""Wan beside diffusers' WanTransformer3DModel, whose weights it takes by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from fvdm.models import build, load_backbone, preset
from fvdm.models.compilation import compile_blocks
from fvdm.models.wan_config import from_diffusers, to_diffusers

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
WIDE = TINY | {"num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16}
WIDE |= {"ffn_dim": 8960, "text_dim": 64}
TIMES = {"one": [[500] * 3, [20] * 3], "per frame": [[0, 400, 1000], [3, 700, 20]]}


def diffusers_model(**changes):
    """Every weight drawn, so that no zero hides a mistake."""
    model = WanTransformer3DModel(**(TINY | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.5 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * scale + ("norm" in name and "weight" in name))
    return model


def ours(theirs):
    model = build(from_diffusers(dict(theirs.config) | {"_class_name": "WanTransformer3DModel"}))
    model.load_state_dict(theirs.state_dict())
    return model


def per_token(theirs, x, t, y):
    tokens = x.shape[3] * x.shape[4] // 4
    return theirs(x.transpose(1, 2), t.repeat_interleave(tokens, 1), y, return_dict=False)[0].transpose(1, 2)


def one_t(theirs, x, t, y):
    return theirs(x.transpose(1, 2), t[:, 0], y, return_dict=False)[0].transpose(1, 2)


@pytest.mark.parametrize("shape", [TINY, TINY | {"cross_attn_norm": False}, WIDE], ids=["tiny", "no norm", "wide"])
@pytest.mark.parametrize(("times", "call"), [("one", one_t), ("one", per_token), ("per frame", per_token)])
def test_outputs_and_gradients_are_those_of_diffusers(shape, times, call):
    theirs = diffusers_model(**shape)
    own = ours(theirs)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, shape["in_channels"], 6, 8, generator=generator)
    y = torch.randn(2, 7, shape["text_dim"], generator=generator)
    t = torch.tensor(TIMES[times])
    found, expected = own(x, t, y), call(theirs, x, t, y)
    assert (found - expected).abs().max() < 1e-5
    push = torch.randn(found.shape, generator=generator) / found.numel() ** 0.5
    (found * push).sum().backward()
    (expected * push).sum().backward()
    grads = dict(theirs.named_parameters())
    for name, p in own.named_parameters():
        assert (p.grad - grads[name].grad).abs().max() < 1e-5, name


@pytest.mark.parametrize("shard_size", ["10GB", "10KB"])
def test_a_folder_of_diffusers_loads_bit_for_bit(tmp_path, shard_size):
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard_size == "10GB" else len(list(tmp_path.glob("*rs"))))
    for path in (tmp_path, f"wan:{tmp_path}"):
        own = load_backbone(path)
        assert own.config.depth == 2
        for name, weight in theirs.state_dict().items():
            assert torch.equal(own.state_dict()[name], weight), name
    assert preset(f"wan:{tmp_path}").hidden == 32


def test_a_folder_of_ours_loads_in_diffusers_bit_for_bit(tmp_path):
    own = ours(diffusers_model())
    own.save_pretrained(tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path)
    for name, weight in own.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
    assert load_backbone(tmp_path).config.frames == own.config.frames


def test_activation_checkpointing_changes_no_gradient():
    own = ours(diffusers_model())
    again = build(replace(own.config, activation_checkpointing=1))
    again.load_state_dict(own.state_dict())
    x, y, t = torch.randn(1, 3, 4, 6, 8), torch.randn(1, 7, 16), torch.tensor([[0, 400, 1000]])
    for model in (own, again):
        model(x, t, y).square().sum().backward()
    for a, b in zip(own.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_mistakes_end_with_one_sentence(tmp_path):
    own = ours(diffusers_model())
    x, t = torch.randn(1, 3, 4, 6, 8), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="needs text"):
        own(x, t)
    with pytest.raises(ValueError, match="needs text"):
        own(x, t, torch.randn(1, 7, 15))
    with pytest.raises(ValueError, match="4 channels"):
        own(torch.randn(1, 3, 5, 6, 8), t, torch.randn(1, 7, 16))
    with pytest.raises(ValueError, match="empty prompt"):
        own.null(2)
    with pytest.raises(ValueError, match="4 channels"):
        own.config.fit((16, 8, 8), 5, 0, False)
    with pytest.raises(ValueError, match="objective to flow"):
        own.config.fit((4, 8, 8), 5, 0, True)
    diffusers_model().save_pretrained(tmp_path, max_shard_size="10KB")
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(ValueError, match="lacks 1 of"):
        load_backbone(tmp_path)
    config = to_diffusers(own.config) | {"image_dim": 1280}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not supported"):
        preset(f"wan:{tmp_path}")


def test_float32_weights_are_mapped_into_memory_and_not_copied(tmp_path):
    diffusers_model().save_pretrained(tmp_path)
    own = load_backbone(tmp_path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(tmp_path) in line]
    for name, p in own.named_parameters():
        assert any(int(low, 16) <= p.data_ptr() < int(high, 16) for low, high in spans), name


def test_the_plan_counts_what_pytorch_counts():
    config = from_diffusers(TINY | {"_class_name": "WanTransformer3DModel"}).fit((4, 6, 8), 3)
    config = replace(config, text_length=7, attention="math")  # PyTorch does not count its fused attention on CPUs
    own = build(config)
    x, y, t = torch.randn(1, 3, 4, 6, 8), torch.randn(1, 7, 16), torch.full((1, 3), 500)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        own(x, t, y)
    assert config.forward_flops() == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert config.tokens == 3 * 3 * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_are_one_graph_and_change_nothing(dtype):
    """Fullgraph, so that a break in a graph is an error; for other sizes, numbers of frames and texts, too."""
    own = ours(diffusers_model()).to(dtype)
    compiled = ours(diffusers_model()).to(dtype)
    compile_blocks(compiled, backend="eager")
    bound = 1e-5 if dtype == torch.float32 else 0.02
    for clips, frames, size, tokens in ((2, 3, (6, 8), 7), (2, 5, (4, 6), 9)):
        x, y = torch.randn(clips, frames, 4, *size), torch.randn(clips, tokens, 16)
        t = torch.randint(0, 1001, (clips, frames))
        for model in (own, compiled):
            model.zero_grad()
            model(x, t, y).float().square().mean().backward()
        assert (own(x, t, y) - compiled(x, t, y)).abs().max() < bound
        for a, b in zip(own.parameters(), compiled.parameters(), strict=True):
            assert (a.grad - b.grad).abs().max() < bound
