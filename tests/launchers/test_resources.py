"""What a job asks of the cluster, from the command line to the sbatch file."""

import subprocess
from pathlib import Path

import pytest
import torch

from fvdm import config as settings
from launchers import demo
from launchers.config import Resources, array_numbers
from launchers.resources import resolve, sbatch_parameters
from launchers.slurm_run import Script
from launchers.submission import launch, sbatch_file


def parse(*words):
    return settings.parse(Resources, settings.join_repeated(words, "sbatch"))


def resources(*words):
    return resolve(parse("--dry-run", "--gpus-per-node", "2", *words))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("30", 30), ("30:20", 31), ("2:00:00", 120), ("1-0", 1440), ("1-12:30", 2190), ("1-00:00:01", 1441)],
)
def test_time_limits_are_slurms(text, minutes):
    assert resources("--time", text).minutes == minutes


@pytest.mark.parametrize(
    ("text", "numbers", "at_a_time"),
    [("", [], 0), ("0-3", [0, 1, 2, 3], 4), ("1,3,5-6", [1, 3, 5, 6], 4), ("0-9:4%2", [0, 4, 8], 2)],
)
def test_arrays_are_slurms(text, numbers, at_a_time):
    assert array_numbers(text) == (numbers, at_a_time)


def test_every_option_reaches_the_sbatch_file():
    words = ["--partition", "gpu", "--account", "lab", "--qos", "high", "--constraint", "ib", "--mem", "200G"]
    words += ["--exclude", "n1", "--nodelist", "n2", "--dependency", "afterok:1", "--gpu-type", "h200"]
    words += ["--cpus-per-task", "12", "--sbatch", "reservation=spring", "--sbatch=--comment=a=b", "--nodes", "4"]
    asked = sbatch_parameters(resources(*words), "name", Path("folder"))
    assert asked["gpus_per_node"] == "h200:2"
    assert (asked["nodes"], asked["ntasks_per_node"], asked["cpus_per_task"]) == (4, 2, 12)
    wanted = {"account": "lab", "qos": "high", "constraint": "ib", "mem": "200G", "exclude": "n1", "nodelist": "n2"}
    wanted |= {"partition": "gpu", "dependency": "afterok:1", "reservation": "spring", "comment": "a=b"}
    assert asked["additional_parameters"] == wanted | {"requeue": True}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--time", "soon"], "--time soon"),
        (["--array", "a-b"], "--array a-b"),
        (["--nodes", "0"], "at least one node"),
        (["--time", "4", "--warn", "300"], "--warn 300"),
        (["--time", "1", "--warn", "30"], "leaves 30 s of training in each start .* use --time 3 or more"),
        (["--cluster", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        resources(*words)


def test_an_option_of_sbatch_needs_a_value():
    with pytest.raises(ValueError, match="give key=value"):
        resources("--sbatch", "spring")


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_trains_on_as_many_ranks_as_there_are_gpus_for(gpus, ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    words = demo.commands(["--steps", "9"])["training"]
    assert words[words.index("--nodes") + 1] == str(ranks)
    asked = resolve(parse(*words[2 : words.index("--config")]))
    assert (asked.world_size, asked.gpus_per_node) == (ranks, min(gpus, 1))


@pytest.mark.parametrize(("gpus", "nodes", "hint"), [(1, 2, "use --nodes 1$"), (4, 8, "use --nodes 4 or fewer$")])
def test_ranks_that_would_share_a_gpu_are_refused(gpus, nodes, hint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"this machine has {gpus}; {hint}"):
        resolve(parse("--cluster", "local", "--nodes", str(nodes)))


def test_a_launched_script_begins_at_its_file_or_module():
    from launchers.slurm_run import split

    assert split(["--nodes", "2", "a/b.py", "--nodes", "3"]) == (["--nodes", "2"], ["a/b.py", "--nodes", "3"])
    assert split(["--time", "5", "-m", "fvdm", "generate", "--num", "4"]) == (
        ["--time", "5"],
        ["-m", "fvdm", "generate", "--num", "4"],
    )
    assert split(["--nodes", "2"]) == (["--nodes", "2"], [])


def test_names_with_spaces_and_percent_signs_reach_bash_and_slurm_as_they_are(tmp_path, monkeypatch):
    root, folder = tmp_path / "a $HOME 'folder'", tmp_path / "50%n run"
    monkeypatch.setattr("launchers.resources.ROOT", root)
    text = sbatch_file(resources("--gpu-bind", "closest", "--cpu-bind", "cores"), folder, "name")
    (line,) = [line for line in text.splitlines() if line.startswith("export PYTHONPATH")]
    for before, after in (("", ""), ("/x y", ":/x y")):
        script = f"PYTHONPATH='{before}'; {line}; printf %s \"$PYTHONPATH\""
        for shell in ("bash", "sh"):
            done = subprocess.run([shell, "-c", script], capture_output=True, text=True)
            assert done.stdout == f"{root}{after}"
    assert f"#SBATCH --output='{tmp_path}/50%%n run/%j_0_log.out'" in text
    assert f"--output '{tmp_path}/50%%n run/%j_%t_log.out'" in text
    assert "--gpu-bind=closest --cpu-bind=cores" in text
    with pytest.raises(ValueError, match="holds %t, which submitit replaces"):
        launch([Script(resources(), ("script.py",))], tmp_path / "50%t", "name")
