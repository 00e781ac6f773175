"""LoRA on every backbone, beside diffusers' own loading of the exported file."""

import hashlib
from dataclasses import replace

import pytest
import torch

from fvdm.models import build, load_backbone, preset
from fvdm.models.compilation import compile_blocks
from fvdm.models.config import LoraConfig, to_dict
from fvdm.models.loading import load_base, read_backbone
from fvdm.models.lora import add_lora, base_weights, load_lora, merge_lora, target_layers
from fvdm.models.lora_files import LORA, Base, Lora, read_lora, save_lora, weights_hash
from tests.latte import randomised
from tests.models.test_wan import diffusers_model, per_token

LORA_CONFIG = LoraConfig(rank=3, alpha=6)
X, Y, T = torch.randn(1, 3, 4, 6, 8), torch.randn(1, 7, 16), torch.tensor([[0, 400, 1000]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Wan in a folder of diffusers, as two files."""
    path = tmp_path_factory.mktemp("wan") / "transformer"
    diffusers_model().save_pretrained(path, max_shard_size="60KB")
    return path


def trained(model):
    """Weights of the updates, drawn, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) / 4)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def wan_with_lora(folder, config=LORA_CONFIG):
    model = load_backbone(folder)
    add_lora(model, config)
    return model, trained(model)


def latte():
    return randomised(build(replace(preset("T/2"), size=8, frames=3, num_classes=2)))


@pytest.mark.parametrize("kind", ["wan", "latte"])
def test_it_begins_at_the_base_and_trains_the_updates_of_the_blocks_alone(folder, kind):
    def make():
        return load_backbone(folder) if kind == "wan" else latte()

    plain, model = make(), make()
    add_lora(model, LORA_CONFIG, seed=3)
    inputs = (X, T, Y) if kind == "wan" else (torch.randn(1, 3, 4, 8, 8), T, torch.tensor([1]))
    assert torch.equal(model(*inputs), plain(*inputs))
    model(*inputs).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == name.startswith("blocks.") * (".lora_" in name), name
    again = make()
    add_lora(again, LORA_CONFIG, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert weights_hash(base_weights(model)) == weights_hash(plain.state_dict())


def test_activation_checkpointing_and_compiled_blocks_change_nothing(folder):
    model, _ = wan_with_lora(folder)
    expected = model(X, T, Y)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.config = replace(model.config, activation_checkpointing=1)
    model(X, T, Y).square().sum().backward()
    assert all(torch.equal(model.get_parameter(name).grad, value) for name, value in gradients.items())
    model.config = replace(model.config, activation_checkpointing=0)
    compiled = compile_blocks(model, backend="eager")  # fails where a graph would break
    assert (compiled(X, T, Y) - expected).abs().max() < 1e-5


def test_diffusers_loads_the_exported_file_and_gives_our_output(folder, tmp_path):
    model, weights = wan_with_lora(folder)
    base = load_backbone(folder)
    sha256 = weights_hash(base.state_dict())
    before = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(folder.glob("*.safetensors"))]
    save_lora(Lora(to_dict(base.config), LORA_CONFIG, Base(f"wan:{folder}", sha256), weights), tmp_path)
    theirs = diffusers_model()
    theirs.load_lora_adapter(tmp_path, weight_name=LORA)
    expected = model(X, T, Y)
    assert (expected - base(X, T, Y)).abs().max() > 0.1
    assert (per_token(theirs, X, T, Y) - expected).abs().max() < 1e-5
    merged = read_backbone(tmp_path)  # ours, and the merged network is a plain one
    assert (merged(X, T, Y) - expected).abs().max() < 1e-5
    assert [*merged.state_dict()] == [*base.state_dict()]
    assert before == [hashlib.sha256(path.read_bytes()).digest() for path in sorted(folder.glob("*.safetensors"))]


def test_the_hash_is_of_the_weights_and_not_of_their_files(folder, tmp_path):
    model = load_backbone(folder)
    diffusers_model().save_pretrained(tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > len(list(tmp_path.glob("*.safetensors"))) == 1
    expected = weights_hash(model.state_dict())
    assert weights_hash(load_backbone(tmp_path).state_dict()) == expected
    model.proj_out.bias.data[0] += 1e-6
    assert weights_hash(model.state_dict()) != expected


def test_targets_are_names_or_ends_of_names(folder):
    model = load_backbone(folder)
    assert target_layers(model, ("attn1.to_q", "proj_out")) == [
        "blocks.0.attn1.to_q",
        "blocks.1.attn1.to_q",
        "proj_out",
    ]
    assert len(target_layers(model, ())) == 2 * (4 + 4 + 2)
    for wrong in ("to_x", "patch_embedding", "norm_q", "o_q"):
        with pytest.raises(ValueError, match=f"no linear layer {wrong}; choose among .*attn1.to_q"):
            target_layers(model, ("to_q", wrong))


def test_another_base_or_none_is_refused_in_one_sentence(folder, tmp_path):
    base = load_backbone(folder)
    _, weights = wan_with_lora(folder)
    home = tmp_path / "home"
    diffusers_model().save_pretrained(home)
    lora = Lora(to_dict(base.config), LORA_CONFIG, Base(f"wan:{home}", weights_hash(base.state_dict())), weights)
    (tmp_path / "lora").mkdir()
    save_lora(lora, tmp_path / "lora")
    assert read_lora(tmp_path / "lora").base == lora.base
    with torch.no_grad():
        (other := diffusers_model()).proj_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"a LoRA of another base model than .*other, whose weights .*--base PATH"):
        load_backbone(tmp_path / "lora", base=str(tmp_path / "other"))
    for path in home.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"LoRA of the base model wan:.*home, which cannot be loaded .* --base PATH"):
        load_backbone(tmp_path / "lora")
    assert torch.equal(load_backbone(tmp_path / "lora", base=str(folder)).proj_out.bias, base.proj_out.bias)
    with pytest.raises(ValueError, match="complete model, so it needs no base"):
        load_backbone(folder, base=str(folder))
    with pytest.raises(ValueError, match="is a LoRA, not a complete model"):
        load_base(latte().config, str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="is of another network than its base"):
        load_lora(wan_with_lora(folder, LoraConfig(rank=2))[0], weights)


def test_latte_takes_its_updates_too_and_merges_them(tmp_path):
    model = latte()
    model.save_pretrained(tmp_path)
    inputs = torch.randn(1, 3, 4, 8, 8), T, torch.tensor([1])
    before = model(*inputs)
    add_lora(model, LoraConfig(rank=2, targets=("qkv", "final_layer")))
    weights = trained(model)
    after = model(*inputs)
    assert (after - before).abs().max() > 1e-3
    other = load_base(model.config, str(tmp_path))
    add_lora(other, LoraConfig(rank=2, targets=("qkv", "final_layer")))
    load_lora(other, weights)
    merge_lora(other)
    assert (other(*inputs) - after).abs().max() < 1e-5
