import subprocess
import sys

import pytest
import torch

from fvdm.models import attention as module
from fvdm.models import blockwise
from fvdm.models.attention import attention, in_launches


def heads(b, n, h, e, seed=0):
    return torch.randn(3, b, n, h, e, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.mark.parametrize("shape", [(3, 5, 40, 4), (40, 5, 3, 4), (7, 2, 7, 4), (1, 3, 1, 2)])
@pytest.mark.parametrize("limit", [1, 6, 64])
def test_a_launch_holds_no_more_than_a_grid_and_changes_no_number(shape, limit):
    q, k, v = heads(*shape)
    sizes = []

    def recorded(q, k, v):
        sizes.append(q.shape[0] * q.shape[2])
        return attention(q, k, v, "math")

    assert torch.allclose(in_launches(recorded, q, k, v, limit), attention(q, k, v, "math"), atol=1e-6)
    assert max(sizes) <= limit
    assert sum(sizes) == shape[0] * shape[2]


def test_queries_may_be_fewer_than_keys():
    q, (_, k, v) = heads(2, 3, 4, 8)[0], heads(2, 9, 4, 8, seed=1)
    found = [attention(q, k, v, backend) for backend in ("math", "sdpa")]
    assert found[0].shape == (2, 3, 4, 8)
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("scores", [1, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_queries_give_what_products_in_one_piece_give(monkeypatch, scores, dtype):
    """Outputs and gradients, for queries that make several blocks and for those that make one."""
    monkeypatch.setattr(blockwise, "SCORES", scores)
    monkeypatch.setattr(blockwise, "FEWEST", 3)
    q, (_, k, v) = heads(2, 7, 3, 8)[0], heads(2, 9, 3, 8, seed=1)
    gradient = torch.randn(2, 7, 3, 8).to(dtype)
    found = []
    for backend in ("blockwise", "math"):
        inputs = [z.to(dtype).requires_grad_() for z in (q, k, v)]
        out = attention(*inputs, backend)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == dtype
        assert torch.allclose(ours, exact, atol=tolerance, rtol=tolerance)


def test_attention_in_blocks_is_an_operator_that_compilers_know():
    inputs = [z.requires_grad_() for z in heads(1, 5, 2, 4)]
    torch.library.opcheck(blockwise.blockwise_attention, tuple(inputs))


FLASH_2 = {"__init__.py": "def flash_attn_func(q, k, v):\n    return q + k + v\n"}
FLASH_4 = {"cute/__init__.py": "def flash_attn_func(q, k, v):\n    return q + k + v, 'sums'\n"}
BROKEN = {"__init__.py": "raise ImportError('libcudart.so: cannot open shared object file')\n"}


@pytest.mark.parametrize(("files", "expected"), [(FLASH_2, "6"), (FLASH_4, "6"), (BROKEN, "None"), ({}, "None")])
def test_flash_attn_is_found_by_importing_its_function(tmp_path, files, expected):
    """Version 4 ships flash_attn/cute alone, so that flash_attn is a namespace without the function."""
    for name, text in files.items():
        path = tmp_path / "flash_attn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    words = "from fvdm.models.attention import FLASH; print(FLASH(1, 2, 3) if FLASH else None)"
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {words}"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(
    ("device", "dtype", "positions", "installed", "expected"),
    [
        ("cpu", torch.bfloat16, 512, True, "math"),
        ("cpu", torch.bfloat16, 513, True, "blockwise"),
        ("cpu", torch.float32, 16, True, "sdpa"),
        ("cuda", torch.bfloat16, 199, True, "sdpa"),
        ("cuda", torch.bfloat16, 200, True, "flash"),
        ("cuda", torch.bfloat16, 100_000, True, "flash"),
        ("cuda", torch.bfloat16, 200, False, "sdpa"),
        ("cuda", torch.float32, 200, True, "sdpa"),
    ],
)
def test_auto_picks_by_the_table(monkeypatch, device, dtype, positions, installed, expected):
    """What would be picked on a GPU is asked of the table alone: no GPU is needed."""
    monkeypatch.setattr(module, "FLASH", (lambda q, k, v: q) if installed else None)
    assert module._chosen.__wrapped__(device, dtype, module._reach(positions), 72, "auto") == expected


def test_a_choice_depends_on_the_table_alone(monkeypatch):
    line = module.Choice("cpu", (torch.float32,), 100, "math")
    monkeypatch.setattr(module, "AUTO", (line, *module.AUTO))
    monkeypatch.setattr(module, "BOUNDS", sorted({choice.positions for choice in module.AUTO}))
    chosen = [module._chosen.__wrapped__("cpu", torch.float32, module._reach(n), 8, "auto") for n in (100, 101)]
    assert chosen == ["math", "sdpa"]
