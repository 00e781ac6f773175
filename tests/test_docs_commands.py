"""Every command of README.md and docs/ is what the program takes: all are read by the real parsers, and those that need
neither a GPU, Slurm, a network nor hours are run as they are typed, with small settings behind them.
"""

import argparse
import functools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from fvdm import config as settings
from fvdm.cli.main import main as fvdm
from tests.data_fixtures import real_frames, write_video
from tests.runs import environment

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("python", "torchrun", "fvdm")
SHELL = ("make", "git", "pip", "mkdir", "tar", "cd", ".")  # of which only make is looked at
TRAINED = "runs/(mine|demo)"
OF_TEXTS = "--(negative-prompt|prompt|prompts|text-encoder|given-encoding|overlap|base) "  # for a model of texts
# What is run, and the settings that make it small. Later words win, so the commands themselves stay as they are typed.
SMALL_RUN = "--cluster local --nodes 1 --model T/4 --steps 2 --engine.cooldown 0 --data.batch_size 2 --data.workers 0"
SMALL_RUN += " --previews.every 0 --validation.every 0 --tracking.system_metrics false --register_as none"
RUN = {
    r"python data_prep/encode_latents.py --videos DIR --out latents/mine ": "--vae builtin --size 32 --workers 1",
    r"python launchers/slurm_train.py --nodes 4 --config configs/ffs_xl.yaml --name mine .*latents/mine$": SMALL_RUN,
    r"python launchers/slurm_train.py .*--dry-run$": "--cluster slurm --data.batch_size 32",
    r"python data_prep/inspect_shards.py latents/mine": "",
    r"fvdm plan --model ": "",
    rf"fvdm checkpoint (list|verify|export) {TRAINED}": "",
    rf"fvdm generate (?!.*{OF_TEXTS})--checkpoint ({TRAINED}|example) ": "--steps 2 --num 1 --formats mp4",
}


class Command(NamedTuple):
    """A command of a page.

    Attributes:
        place: page and line.
        words: as a shell splits them.
    """

    place: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def blocks(text):
    """The lines of indented code, each with its number; lines that end in a backslash are joined."""
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        if line.startswith("    ") and not line.lstrip().startswith(("|", "-", "*", "[")):
            while line.endswith("\\"):
                line = line[:-1] + next(lines)[1]
            yield number, line.strip()


def commands_of(page):
    for number, line in blocks(page.read_text()):
        if line.split()[0].removeprefix(".venv/bin/") in OURS + SHELL:
            words = shlex.split(line.removeprefix(".venv/bin/"), comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield Command(f"{page.relative_to(ROOT)}:{number}", tuple(w for w in words[:end] if w != "..."))
                words = words[end + 1 :]


COMMANDS = [command for page in PAGES for command in commands_of(page)]
FVDM = [command for command in COMMANDS if command.words[0] in OURS and command.words[:3] != ("python", "-m", "venv")]


class ParsedError(BaseException):
    """Ends a program after its command line was read; no program catches it."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A checkout to type in, with the files that the pages name."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("data_prep", "launchers", "benchmarks", "configs", "docs", "fvdm"):
        (folder / name).symlink_to(ROOT / name)
    frames = real_frames()[:96]
    for name, part in (("DIR/a", frames[:48]), ("DIR/b", frames[48:]), ("clip", frames[:60])):
        write_video(folder / f"{name}.mp4", part)
    write_video(folder / "before.mp4", frames[:30])
    write_video(folder / "after.mp4", frames[60:90])
    for name in ("cat", "first", "last"):
        Image.fromarray(frames[0]).save(folder / f"{name}.png")
    (folder / "latents/sample").mkdir(parents=True)
    (folder / "schedule.csv").write_text("".join(",".join(["0"] + [str(t)] * 15) + "\n" for t in (1000, 500, 0)))
    return folder


def read_command_line(words, monkeypatch):
    """Start a program, and stop it as soon as its real parser has read the words."""
    parse, parse_args = settings.parse, argparse.ArgumentParser.parse_args

    def stop(read):
        def reads(*args, **more):
            read(*args, **more)
            raise ParsedError

        return reads

    monkeypatch.setattr(settings, "parse", stop(parse))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop(parse_args))
    monkeypatch.setattr(sys, "argv", list(words))
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = functools.partial(fvdm, words[1:])
    if words[0] != "fvdm":
        run = functools.partial(runpy.run_path, words[0], run_name="__main__")
    with pytest.raises(ParsedError):
        run()


def program(words):
    """The program and its own words: without python, or torchrun and its options."""
    if words[0] == "torchrun":
        words = words[3:]  # torchrun --nproc-per-node N
        return words[1:] if words[0] == "-m" else words
    return words[1:] if words[0] == "python" else words


@pytest.mark.parametrize("command", FVDM, ids=lambda command: f"{command.place} {command.text}"[:90])
def test_every_command_is_one_that_the_program_takes(command, lab, monkeypatch, capsys):
    monkeypatch.chdir(lab)
    words = program(command.words)
    with monkeypatch.context() as patch:
        read_command_line(words, patch)
    script = next((k for k, word in enumerate(words) if k and word.endswith(".py")), 0)
    if words[0] == "launchers/slurm_run.py":
        with monkeypatch.context() as patch:
            read_command_line(words[script:], patch)
    assert capsys.readouterr().err.count("error") == 0


def test_every_target_of_make_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {command.words[1] for command in COMMANDS if command.words[0] == "make"}
    named |= {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert len(named) > 2
    assert named <= set(targets)


def test_every_file_that_the_pages_name_is_there():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        tops = "fvdm|data_prep|launchers|benchmarks|tests|tools"
        for name in re.findall(rf"(?<![\w/.-])(?:{tops})/[\w/]+\.(?:py|sh|yaml)", page.read_text()):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: {name}"


def names_of_settings():
    """Every name that can stand behind `--`: fields and arguments of the sources, and what other programs take."""
    source = "\n".join(
        path.read_text()
        for top in ("fvdm", "data_prep", "launchers", "benchmarks", "docs")
        for path in ROOT.glob(f"{top}/**/*.py")
    )
    names = set(re.findall(r"^    (\w+): ", source, re.MULTILINE)) | set(re.findall(r'"--([\w-]+)"', source))
    others = "nproc_per_node gpus_per_task no_install_recommends no_deps find_links system_site_packages no_index"
    others += " python_version only_binary abi platform implementation kill_on_bad_exit"
    return {name.replace("-", "_").rstrip("_") for name in names} | set(others.split())


def test_every_option_in_the_text_exists():
    known = names_of_settings()
    for page in PAGES:
        for line in page.read_text().splitlines():
            for option in re.findall(r"(?<![\w-])--([a-z][\w.-]*[\w])", line):
                parts = option.replace("-", "_").split(".")
                parts[0] = parts[0] if parts[0] in known else parts[0].removeprefix("no_")
                assert set(parts) <= known, f"{page.relative_to(ROOT)}: --{option}"


@pytest.mark.slow
def test_commands_that_need_nothing_are_run_as_typed(lab, monkeypatch, capsys):
    """In the order of the pages, with one run that the README's own command trains."""
    monkeypatch.chdir(lab)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{lab}/mlflow.db")
    done: dict[str, int] = {}
    for command in FVDM:
        small = [more for pattern, more in RUN.items() if re.match(pattern, command.text)]
        if not small or command.text in done:
            continue
        words = [*command.words, *small[0].split()]
        if "--length" in words:
            words += ["--length", "24"]
        done[command.text] = len(done)
        if words[0] == "python":
            run = subprocess.run(
                [sys.executable, *words[1:]],
                env=environment(0, 1, 0) | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, f"{command.place}: {command.text}\n{run.stdout}{run.stderr}"
        else:
            fvdm(words[1:])
        if Path("runs/mine").is_dir() and not Path("runs/demo").exists():
            Path("runs/demo").symlink_to("mine")
    run = " ".join(done)
    assert all(re.search(pattern, run) for pattern in (word.rstrip("$") for word in RUN)), "each line of RUN is used"
    assert len(done) >= 25
    assert list(Path("out").glob("image-to-video*.mp4"))


@pytest.mark.slow
def test_the_python_of_the_pages_runs(lab, monkeypatch):
    import torch

    monkeypatch.chdir(lab)
    for page in (ROOT / "README.md", ROOT / "docs" / "tasks.md"):
        text = page.read_text()
        code = re.search(r"^    from fvdm import load\n(?:(?:    .*)?\n)+", text, re.MULTILINE)[0]
        code = re.sub(r'"runs/demo"', '"example"', code)
        found = {"image": torch.zeros(3, 40, 40, dtype=torch.uint8)}
        exec("\n".join(line[4:] for line in code.splitlines()), found)
        assert found["video"].shape[:3] == (1, 16, 3)
