"""Checkpoints from elsewhere give the same output here; foreign and damaged ones are refused in a sentence."""

import argparse
import json
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import nn

from fvdm.cli import progress
from fvdm.cli.convert import ConvertConfig, convert, main
from fvdm.diffusion.config import DiffusionConfig
from fvdm.models import load_backbone, preset
from fvdm.models.inference import read_inference_config
from fvdm.models.latte import Latte
from fvdm.models.official import from_official, load_torch
from tests.latte import Block, OfficialLatte, positions, randomised, space_positions, timestep_embedding

SHAPE = {"depth": 4, "width": 64, "heads": 4, "patch": 2, "channels": 4, "size": 8, "frames": 6}


class Fvdm(OfficialLatte):
    """The official FVDM network as it is published: a timestep per frame, two lists of blocks, and a modulation that
    the temporal blocks compute for every token. `forward(x (b f c h w), t (b f) in 0..999, y (b) or None)`."""

    def __init__(self, **shape):
        super().__init__(**shape)
        self.blocks_spatial = nn.ModuleList(self.blocks[0::2])
        self.blocks_temp = nn.ModuleList(self.blocks[1::2])
        del self.blocks

    def forward(self, x, t, y=None):
        b, f = x.shape[:2]
        x = self.x_embedder["proj"](x.flatten(0, 1)).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](timestep_embedding(t.flatten())).view(b, f, -1)
        if y is not None:
            c = c + self.y_embedder["embedding_table"](y)[:, None]
        n = x.shape[1]
        for i, (space, time) in enumerate(zip(self.blocks_spatial, self.blocks_temp, strict=True)):
            x = space(x, c.flatten(0, 1))
            x = rearrange(x, "(b f) n d -> (b n) f d", b=b)
            x = x + self.temp_embed if i == 0 else x
            x = per_token(time, x, repeat(c, "b f d -> (b n) f d", n=n))
            x = rearrange(x, "(b n) f d -> (b f) n d", b=b)
        shift, scale = self.final_layer["adaLN_modulation"](c.flatten(0, 1)).chunk(2, dim=1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        x = self.final_layer["linear"](x)
        s, p = self.side, self.patch
        return rearrange(x, "(b f) (h w) (p q c) -> b f c (h p) (w q)", b=b, h=s, w=s, p=p, q=p)


def per_token(block: Block, x, c):
    shift, scale, gate, shift_2, scale_2, gate_2 = block.adaLN_modulation(c).chunk(6, dim=2)
    x = x + gate * block.attn(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    return x + gate_2 * block.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_2) + shift_2)


def clip(seed=0):
    return torch.randn((2, 6, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def compare(theirs, ours, classes):
    """Equal to 1e-5 over the whole range of timesteps. Their index 0..999 is our t = 1..1000."""
    y = torch.tensor([1, classes]) if classes else None
    per_frame = isinstance(theirs, Fvdm)
    for index in (0, 1, 417, 999):
        t = torch.full((2, 6), index)
        if per_frame:
            t = (t + 97 * torch.arange(12).view(2, 6)) % 1000
        with torch.no_grad():
            expected = theirs(clip(), t if per_frame else t[:, 0], y)
            got = ours(clip(), t + 1, y)
        assert expected.abs().max() > 0.1
        assert (got - expected).abs().max() < 1e-5


WRAPPINGS = {
    "bare": lambda s: s,
    "ema": lambda s: {"ema": s, "model": {k: torch.zeros_like(v) for k, v in s.items()}, "opt": {}},
    "model": lambda s: {"model": s},
    "compiled": lambda s: {"ema": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "ddp": lambda s: {"ema": {f"module._orig_mod.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("network", [OfficialLatte, Fvdm])
def test_published_checkpoints_give_the_same_output(network, wrapping, classes):
    theirs = randomised(network(**SHAPE, classes=classes))
    ours = from_official(WRAPPINGS[wrapping](theirs.state_dict()), num_heads=4)
    assert ours.config == replace(preset("T/2"), depth=4, heads=4, size=8, frames=6, num_classes=classes)
    compare(theirs, ours, classes)


def test_a_clean_frame_has_their_index_0():
    theirs = randomised(Fvdm(**SHAPE))
    ours = from_official(theirs.state_dict(), 4)
    t = torch.tensor([[0, 500, 500, 500, 500, 0]]).expand(2, 6)
    assert torch.allclose(ours(clip(), t), theirs(clip(), (t - 1).clamp(min=0)), atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("network", [OfficialLatte, Fvdm])
def test_from_file_to_folder_to_output(network, suffix, tmp_path):
    theirs = randomised(network(**SHAPE, classes=2))
    path = tmp_path / f"theirs{suffix}"
    if suffix == ".pt":  # as their training scripts write it
        torch.save({"ema": theirs.state_dict(), "opt": {"lr": 1e-4}, "args": argparse.Namespace(lr=1e-4)}, path)
    else:
        save_file(theirs.state_dict(), path)
    config = ConvertConfig(str(path), str(tmp_path / "out"), heads=4, classes=("cat", "dog"), stride=2)
    convert(config)
    again = load_backbone(tmp_path / "out")
    compare(theirs, again, 2)
    use = read_inference_config(tmp_path / "out", again.config)
    assert use.classes == ("cat", "dog")
    assert use.stride == 2
    assert use.diffusion == DiffusionConfig()
    with pytest.raises(ValueError, match="name a new folder"):
        convert(config)
    compare(theirs, load_backbone(path, num_heads=4), 2)


def test_sizes_are_recognised_by_their_shapes():
    with torch.device("meta"):
        state = OfficialLatte(12, 384, 6, 2, 4, 32, 16).state_dict()
    tables = {"pos_embed": space_positions(384, 16)[None], "temp_embed": positions(384, torch.arange(16))[None]}
    assert from_official({k: torch.zeros(v.shape) for k, v in state.items()} | tables).config == preset("S/2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("network", [OfficialLatte, Fvdm])
def test_checkpoints_in_half_precision_convert(network, dtype):
    theirs = randomised(network(**SHAPE | {"frames": 40})).to(dtype)
    ours = from_official(theirs.state_dict(), 4)
    assert ours.config.frames == 40
    x, t = torch.randn(1, 40, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((1, 40), 500)
    theirs.float()
    with torch.no_grad():
        expected = theirs(x, t if network is Fvdm else t[:, 0])
        assert (ours(x, t + 1) - expected).abs().max() < 0.02, "the tables alone are rounded"


def learned(table):
    """Tables that were trained along, or belong to other positions, and so to another network."""
    return latte_state() | {table: latte_state()[table].flip(1)}


def latte_state():
    return OfficialLatte(**SHAPE).state_dict()


FOREIGN = {
    "image DiT": (lambda: {k: v for k, v in latte_state().items() if k != "temp_embed"}, "no temp_embed"),
    "U-Net": (lambda: {"down_blocks.0.weight": torch.zeros(3)}, "down_blocks"),
    "text-to-video": (
        lambda: latte_state() | {"text_embedding_projection.1.weight": torch.zeros(3, 3)},
        "left over text",
    ),
    "incomplete": (lambda: {k: v for k, v in latte_state().items() if "blocks.3.mlp" not in k}, "missing blocks.3.mlp"),
    "other shapes": (lambda: latte_state() | {"blocks.1.mlp.fc1.bias": torch.zeros(7)}, "other shapes"),
    "ours": (lambda: Latte(preset("T/2")).state_dict(), "not a Latte or FVDM checkpoint"),
    "empty": (dict, "not a Latte or FVDM checkpoint"),
    "a list": (lambda: [1, 2], "holds a list"),
    "a flat embedding": (lambda: latte_state() | {"x_embedder.proj.weight": torch.zeros(64, 16)}, "other shapes"),
    "other positions in space": (lambda: learned("pos_embed"), "positions in space, pos_embed, are not the sines"),
    "other positions in time": (lambda: learned("temp_embed"), "positions in time, temp_embed, are not the sines"),
    "a table per head": (lambda: latte_state() | {"temp_embed": torch.zeros(1, 6, 16)}, "positions in time"),
    "odd channels": (lambda: latte_state() | {"final_layer.linear.weight": torch.zeros(20, 64)}, "channels come out"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_checkpoints_are_refused_in_one_sentence(what):
    make, sentence = FOREIGN[what]
    with pytest.raises(ValueError, match=sentence) as caught:
        from_official(make(), 4)
    assert "\n" not in str(caught.value)


def test_unknown_sizes_ask_for_the_heads():
    with pytest.raises(ValueError, match="how many heads"):
        from_official(latte_state())


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def test_damaged_files_and_files_with_code_are_refused(tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "evil2.pt")
    torch.save(latte_state(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name in ("evil.pt", "evil2.pt", "cut.pt", "empty.pt", "cut.safetensors", "missing.pt", "missing.safetensors"):
        with pytest.raises(ValueError, match="cannot read weights from") as caught:
            load_torch(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "never run" not in capsys.readouterr().out


def test_the_command_converts_and_refuses(tmp_path, capsys):
    torch.save({"ema": latte_state()}, tmp_path / "a.pt")
    main([str(tmp_path / "a.pt"), str(tmp_path / "out"), "--heads", "4"])
    assert "4 blocks of width 64" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "inference.json",
    ]
    for words, sentence in (
        ([str(tmp_path / "none.pt"), str(tmp_path / "out2")], "cannot read weights"),
        ([str(tmp_path / "a.pt"), str(tmp_path / "out")], "name a new folder"),
        ([str(tmp_path / "a.pt"), str(tmp_path / "out3"), "--heads", "4", "--classes", "[a]"], "0 classes"),
        ([str(tmp_path / "a.pt")], "dst"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert sentence in capsys.readouterr().err


def test_reading_and_writing_a_large_file_shows_how_far_it_is(tmp_path, capsys, monkeypatch):
    torch.save({"ema": latte_state()}, tmp_path / "a.pt")
    size, pieces = (tmp_path / "a.pt").stat().st_size, []
    load_torch(tmp_path / "a.pt", pieces.append)
    assert 0.95 * size < sum(pieces) < 1.5 * size
    words = [str(tmp_path / "a.pt"), "--heads", "4"]
    main([words[0], str(tmp_path / "small"), *words[1:]])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LARGE", 0)
    monkeypatch.setattr(progress, "LOG_EVERY", 0)
    main([words[0], str(tmp_path / "large"), *words[1:]])
    printed = capsys.readouterr().err
    assert re.search(r"reading a\.pt: +[1-9]\d*%", printed)
    assert "writing large: " in printed


def test_a_pretrained_folder_gives_the_same_model(tmp_path):
    model = randomised(Latte(replace(preset("T/2"), size=8, frames=6, num_classes=3)))
    model.save_pretrained(tmp_path / "m")
    again = Latte.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    x, t, y = clip(), torch.full((2, 6), 9), torch.tensor([0, 3])
    assert torch.equal(again(x, t, y), model(x, t, y))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["_class_name"] == "Latte"
    assert read_inference_config(tmp_path / "m", again.config).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
        ({"warp": 3}, "does not know: warp"),
        ({"depth": "4"}, "depth is '4', not a int"),
        ({"width": 128}, "do not fit"),
    ],
)
def test_folders_that_do_not_fit_are_refused(change, sentence, tmp_path):
    Latte(replace(preset("T/2"), size=8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=sentence):
        Latte.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no model"):
        Latte.from_pretrained(tmp_path / "nowhere")
