import json
from dataclasses import replace

import pytest
import torch

from fvdm.models import config_from, load_backbone, preset
from fvdm.models.attention import attention
from fvdm.models.config import LatteConfig, to_dict
from fvdm.models.latte import Latte, space_table
from fvdm.models.official import from_official
from tests.latte import OfficialLatte, randomised, timestep_embedding

TINY = replace(preset("T/2"), size=8, frames=6)


def clip(b=2, f=6, seed=0, config=TINY):
    return torch.randn((b, f, *config.latent_shape), generator=torch.Generator().manual_seed(seed))


def model(**changes):
    return randomised(Latte(replace(TINY, depth=4, **changes)))


@pytest.mark.parametrize(("name", "millions"), [("S/2", 32.59), ("B/2", 129.76), ("L/2", 457.09), ("XL/2", 673.99)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        count = Latte(preset(name)).num_parameters()
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_an_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match="XL/2"):
        preset("XXL/2")
    with pytest.raises(ValueError, match="/8"):
        preset("S/3")


@pytest.mark.parametrize("changes", [{"depth": 3}, {"width": 66}, {"size": 9}])
def test_shapes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match=r"depth|width|patches"):
        replace(TINY, **changes)


@pytest.mark.parametrize("classes", [0, 5])
def test_with_one_t_for_all_frames_it_is_latte(classes):
    latte = randomised(
        OfficialLatte(depth=4, width=64, heads=4, patch=2, channels=4, size=8, frames=6, classes=classes)
    )
    ours = from_official(latte.state_dict(), num_heads=4)
    x = clip()
    for index in (0, 1, 417, 999):
        y = torch.tensor([3, 5]) if classes else None
        t = torch.full((2,), index)
        expected = latte(x, t, y)
        got = ours(x, (t + 1)[:, None].expand(2, 6), y)
        assert expected.abs().max() > 0.1
        assert (got - expected).abs().max() < 1e-5


def test_a_fresh_model_predicts_zero():
    assert (Latte(TINY)(clip(), torch.full((2, 6), 500)) == 0).all()


def test_output_has_twice_the_channels_with_learned_variance_only():
    t = torch.full((2, 6), 500)
    assert model()(clip(), t).shape == (2, 6, 8, 8, 8)
    assert model(learned_variance=False)(clip(), t).shape == (2, 6, 4, 8, 8)


@pytest.mark.parametrize("t", [torch.tensor(7), torch.full((2,), 7), torch.full((2, 1), 7), torch.full((2, 5), 7)])
def test_a_scalar_timestep_raises(t):
    with pytest.raises(ValueError, match="one timestep per frame"):
        model()(clip(), t)


def test_wrong_clips_and_labels_are_refused():
    t = torch.full((2, 6), 7)
    with pytest.raises(ValueError, match="up to 6 frames"):
        model()(torch.zeros(2, 7, 4, 8, 8), torch.full((2, 7), 7))
    with pytest.raises(ValueError, match="4 x 8 x 8"):
        model()(torch.zeros(2, 6, 4, 4, 4), t)
    with pytest.raises(ValueError, match="no classes"):
        model()(clip(), t, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="needs class labels"):
        model(num_classes=3)(clip(), t)


def test_every_frames_timestep_reaches_its_own_frame():
    """Changing one frame's t changes that frame most directly: with time attention cut, nothing else."""
    net = model()
    for block in net.blocks[1::2]:
        torch.nn.init.zeros_(block.attn.proj.weight)
    t = torch.full((2, 6), 400)
    other = t.clone()
    other[:, 2] = 900
    changed = (net(clip(), t) - net(clip(), other)).abs().amax((0, 2, 3, 4)) > 0
    assert changed.tolist() == [False, False, True, False, False, False]


def test_frames_see_each_other_through_time_attention():
    t = torch.full((2, 6), 400)
    other = clip()
    other[:, 5] += 1
    assert ((model()(clip(), t) - model()(other, t)).abs().amax((0, 2, 3, 4)) > 0).all()


def test_a_shorter_clip_is_welcome():
    assert model()(clip(f=3), torch.full((2, 3), 9)).shape == (2, 3, 8, 8, 8)


def test_clean_frames_share_the_lowest_noise_level():
    net, x = model(), clip()
    assert torch.equal(net(x, torch.zeros(2, 6, dtype=torch.long)), net(x, torch.ones(2, 6, dtype=torch.long)))


def test_the_embedding_tells_all_timesteps_apart_in_bf16():
    """Integers above 256 collide in bfloat16; the sinusoids must be computed in float32."""
    embedding = Latte(TINY).to(torch.bfloat16).t_embedder
    with torch.no_grad():
        waves = []
        embedding[0].register_forward_pre_hook(lambda module, args: waves.append(args[0]))
        embedding(torch.arange(1, 1001)[None])
    expected = timestep_embedding(torch.arange(1000))
    assert (waves[0][0].float() - expected).abs().max() < 0.005


def test_recomputation_changes_no_gradient():
    grads = []
    for every in (0, 1, 2):
        net = model(activation_checkpointing=every)
        net(clip(), torch.full((2, 6), 7)).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_attention_backends_agree_and_unknown_ones_are_refused():
    q, k, v = (torch.randn(3, 7, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert torch.allclose(attention(q, k, v, "math"), attention(q, k, v, "sdpa"), atol=1e-6)
    assert torch.allclose(attention(q, k, v), attention(q, k, v, "sdpa"))
    with pytest.raises(ValueError, match="auto, flash, sdpa, math"):
        attention(q, k, v, "xformers")
    with pytest.raises(ValueError, match="flash-attn cannot be used"):
        attention(q, k, v, "flash")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["flash", "sdpa"])
def test_attention_backends_agree_on_the_gpu(backend):
    if backend == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    q, k, v = (torch.randn(2, 256, 16, 72, device="cuda") for _ in range(3))
    half = [z.bfloat16() for z in (q, k, v)]
    assert (attention(*half, backend).float() - attention(q, k, v, "math")).abs().max() < 1e-2


def test_the_default_is_the_papers_xl():
    assert preset("XL/2") == LatteConfig()


def test_frames_need_not_be_square():
    """Each token knows its row and its column: a wide frame's table holds that of a square in its first columns."""
    wide = randomised(Latte(replace(TINY, size=(4, 8))))
    x = torch.randn(2, 6, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((2, 6), 400)
    assert wide(x, t).shape == (2, 6, 8, 4, 8)
    table = wide.space.view(2, 4, -1)
    assert torch.equal(table[:, :2], space_table(wide.config.width, 2, 2).view(2, 2, -1))
    assert (wide.config.latent_shape, wide.config.tokens) == ((4, 4, 8), 6 * 8)
    with pytest.raises(ValueError, match="4 x 4 x 8"):
        wide(x.transpose(3, 4), t)
    with pytest.raises(ValueError, match="do not tile latent frames of 4 x 7"):
        replace(TINY, size=(4, 7))


def test_a_square_has_one_spelling():
    assert replace(TINY, size=(8, 8)) == replace(TINY, size=8)
    assert preset("XL/2").fit((16, 8, 12), 5, 3, False) == replace(
        LatteConfig(), channels=16, size=(8, 12), frames=5, num_classes=3, learned_variance=False
    )


def test_a_rectangle_is_saved_and_loaded(tmp_path):
    model = randomised(Latte(replace(TINY, size=(4, 8), num_classes=2)))
    model.save_pretrained(tmp_path)
    again = load_backbone(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert config_from(json.loads(json.dumps(to_dict(model.config)))) == model.config


def test_a_folder_of_version_0_1_still_loads(tmp_path):
    Latte(TINY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["recompute"] = values.pop("activation_checkpointing")
    path.write_text(json.dumps(values | {"_class_name": "VideoDiT"}))
    assert load_backbone(tmp_path).config == TINY
    path.write_text(json.dumps(values | {"depth": [2, 2]}))
    with pytest.raises(ValueError, match="depth is"):
        load_backbone(tmp_path)
