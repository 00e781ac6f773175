"""The plan's counts against PyTorch's own, and its memory against a real training's."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fvdm.cli import plan as cli
from fvdm.models import build, preset
from fvdm.models.config import LoraConfig
from fvdm.models.lora import add_lora
from fvdm.models.wan_config import PUBLISHED, WanConfig
from fvdm.training.config import EngineConfig
from fvdm.training.plan import (
    activation_bytes,
    flops,
    largest_micro_batch,
    memory,
    parameters,
    trained_parameters,
    wire_bytes,
)
from tests.commands import fvdm
from tests.runs import ROOT

ENGINE = EngineConfig()


def small(**changes):
    return replace(preset("T/2"), size=8, frames=6, attention="math", **changes)


@pytest.mark.parametrize(("name", "millions"), [("S/2", 32.59), ("B/2", 129.76), ("L/2", 457.09), ("XL/2", 673.99)])
def test_parameters_are_the_papers_without_the_position_tables(name, millions):
    model = preset(name)
    tables = ((model.size // model.patch) ** 2 + model.frames) * model.width
    assert round((parameters(model) + tables) / 1e6, 2) == millions


@pytest.mark.parametrize("changes", [{}, {"width": 96, "heads": 3, "depth": 4}, {"learned_variance": False}])
def test_arithmetic_is_what_pytorch_counts(changes):
    config = small(**changes)
    model = build(config)
    x, t = torch.randn(1, 6, 4, 8, 8), torch.full((1, 6), 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    assert flops(config, training=False) == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        model(x, t).sum().backward()
    # Weights and tokens get a gradient each; the first layer's input does not.
    assert flops(config) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_activations_are_what_autograd_saves():
    """In float32, with PyTorch's fused attention; what is saved twice is counted once, parameters are not."""
    config = replace(preset("XS/2"), size=16, frames=8, attention="sdpa", depth=4)
    model = build(config)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(2, 8, 4, 16, 16), torch.full((2, 8), 5))
    kept = sum(size for size, _ in saved.values())
    assert out.requires_grad
    assert activation_bytes(config, 2, "fp32") == pytest.approx(kept, rel=0.1)


def test_more_ranks_need_less_and_more_clips_need_more():
    model = preset("XL/2")
    peaks = [memory(model, ENGINE, world, 1).peak for world in (1, 2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)
    assert memory(model, ENGINE, 8, 4).peak > memory(model, ENGINE, 8, 2).peak
    rooms = [largest_micro_batch(replace(model, activation_checkpointing=k), ENGINE, 32, 70e9) for k in (0, 2, 1)]
    assert rooms == sorted(rooms)
    assert memory(model, ENGINE, 32, rooms[0]).peak <= 70e9 < memory(model, ENGINE, 32, rooms[0] + 1).peak


@pytest.mark.parametrize(("name", "millions"), zip(PUBLISHED, (1418.996, 14288.491, 4999.788), strict=True))
def test_published_wans_have_their_parameters_without_a_network(name, millions):
    assert parameters(preset(f"wan:{name}")) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_lora_is_counted_as_peft_makes_it_and_pytorch_runs_it():
    config = WanConfig(depth=2, frames=5, size=(8, 12), heads=2, head_width=24, hidden=96, channels=4, text_width=16)
    config = replace(config, text_length=7, attention="math")
    lora = LoraConfig(rank=4, targets=("attn1.to_q", "attn1.to_v", "ffn.net.2"))
    model = build(config)
    add_lora(model, lora)
    assert trained_parameters(config, lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    x, y, t = torch.randn(1, 5, 4, 8, 12), torch.randn(1, 7, 16), torch.full((1, 5), 500)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y).sum().backward()
    # What comes before the first update gets no gradient, and is counted by the plan.
    assert flops(config, lora=lora) == pytest.approx(counter.get_total_flops(), rel=0.1)
    engine = EngineConfig(precision="bf16")
    full, small = memory(config, engine, 4, 1), memory(config, engine, 4, 1, lora=lora)
    assert small.optimizer / full.optimizer == trained_parameters(config, lora) / parameters(config)
    assert small.weights == 2 * sum(p.numel() for p in model.parameters())


def test_bytes_on_the_wire():
    assert wire_bytes(100, 1, 1) == 0
    assert wire_bytes(100, 4, 1) == 0.75 * 1000  # float32 gradients all-reduced, bf16 weights gathered
    assert wire_bytes(100, 4, 3) == 0.75 * 2600


def test_the_command_prints_the_plan_and_refuses_in_a_sentence():
    done = fvdm("plan", "--model", "XL/2", "--nodes", "4", "--gpus-per-node", "8")
    assert done.returncode == 0, done.stderr
    assert "673.68M trainable parameters" in done.stdout
    assert "32 ranks" in done.stdout
    for words, sentence in ((["--model", "Q/2"], "unknown"), (["--batch-size", "3"], "does not divide")):
        done = fvdm("plan", *words)
        assert done.returncode == 2
        assert sentence in done.stderr


def test_the_plan_takes_the_shape_from_the_data_or_from_the_config_of_a_run(latents, tmp_path):
    words = ("--model", "T/2", "--frames", "6")
    by_data = fvdm("plan", *words, "--data.path", str(latents)).stdout
    assert "clips of 6 x 4 x 4 x 4" in by_data
    assert "clips of 6 x 4 x 8 x 8" in fvdm("plan", *words, "--data.path", str(latents), "--size", "8").stdout
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: run\nmodel: T/2\ndata: {{path: {latents}, frames: 6, batch_size: 16}}\n"
        "engine: {micro_batch: 1, precision: fp32}\n"
    )
    done = fvdm("plan", "--config", str(config), "--gpus-per-node", "4")
    assert done.returncode == 0, done.stderr
    assert "clips of 6 x 4 x 4 x 4" in done.stdout
    assert "4 ranks, global batch 16 = 4 x 1 clips x 4 micro-batches, fp32" in done.stdout
    assert "S/2: " in fvdm("plan", f"--config={config}", "--model", "S/2").stdout
    config.write_text("name: run\nmodel: T/2\ndata: {path: nowhere}\n")
    done = fvdm("plan", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "nowhere is not there yet" in done.stderr
    config.write_text("name: run\nmodle: T/2\n")
    assert "did you mean model?" in fvdm("plan", "--config", str(config)).stderr


def test_the_configs_of_wan_fit_the_gpus_that_they_name(capsys):
    for config, peak, trained in (
        ("wan_1_3b", "12.07", "1419.00M trainable parameters;"),
        ("wan_14b_lora", "54.13", "613.42M trainable parameters of 14288.49M (LoRA of rank 128);"),
    ):
        cli.main(["--config", str(ROOT / f"configs/{config}.yaml"), "--nodes", "4", "--gpus-per-node", "8"])
        printed = capsys.readouterr().out
        assert re.search(rf"peak +{peak}\n", printed)
        assert trained in printed
        assert re.search(r"what fits on h100.*every block recomputed +[1-9]", printed, re.DOTALL)


@pytest.mark.slow
def test_a_real_training_needs_what_was_planned(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", str(ROOT / "benchmarks/train_memory.py"), "--model", "B/2", "--size", "16"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    more = ["--steps", "2", "--out", str(tmp_path / "journal")]
    done = subprocess.run([*command, *more], cwd=tmp_path, env=hidden, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    ratio = float(re.findall(r"measured_over_predicted\s+([\d.]+)", done.stdout)[0])
    assert 0.85 < ratio < 1.15
    events = [json.loads(line) for line in (tmp_path / "journal/events.jsonl").read_text().splitlines()]
    assert any("peak_gb" in event.get("figures", {}) for event in events)


@pytest.mark.slow
def test_a_step_sends_the_bytes_that_were_planned(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", str(ROOT / "benchmarks/train_comm.py"), "--model", "XS/2", "--size", "8"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    more = ["--frames", "2", "--micro-batches", "2", "--steps", "1", "--out", str(tmp_path / "journal")]
    done = subprocess.run([*command, *more], cwd=tmp_path, env=hidden, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0.9 < float(re.findall(r"measured_over_predicted\s+([\d.]+)", done.stdout)[0]) < 1.1


@pytest.mark.slow
def test_what_a_checkpoint_costs_is_measured_and_no_run_is_touched(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "benchmarks/checkpoint_stall.py"), "--model", "T/2", "--size", "8", "--frames", "4"]
    command += ["--steps", "1", "--rounds", "1", "--out", str(tmp_path / "out")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=hidden, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.count(" ") > 4 and "http" not in line]
    figures = {words[0]: float(words[1]) for words in lines}
    assert figures["rank_gb"] > 0
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert any(figures.keys() <= event.get("figures", {}).keys() for event in events)
    kept = tmp_path / "out/checkpoints/step-00000001"
    kept.mkdir(parents=True)
    done = subprocess.run(command, cwd=tmp_path, env=hidden, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "holds checkpoints already" in done.stderr
    assert kept.exists()
