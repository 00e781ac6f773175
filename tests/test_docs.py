"""What the README and the documentation of the tasks say can be typed."""

import re
import shlex
from pathlib import Path

from data_prep.config import EncodeConfig
from fvdm import config as settings
from fvdm.cli.checkpoint import CheckpointCommand
from fvdm.cli.convert import ConvertConfig
from fvdm.cli.plan import with_training_config
from fvdm.data.config import DataConfig
from fvdm.diffusion.tasks import TASKS
from fvdm.generation.config import GenerateCommand, indices
from fvdm.training.config import PlanConfig, TrainConfig
from launchers.config import TrainJobConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEXT = (ROOT / "docs" / "tasks.md").read_text()


def test_every_command_of_the_tasks_page_parses_and_every_task_has_one():
    commands = re.findall(r"fvdm generate (.*)", TEXT)
    parsed = [settings.parse(GenerateCommand, shlex.split(command)) for command in commands]
    assert {config.task for config in parsed} == set(TASKS)
    assert all(isinstance(indices(config.frames), tuple) for config in parsed)
    assert all(f"| `{task}` |" in TEXT for task in TASKS)


def test_every_option_that_the_tasks_page_names_exists():
    words = {word.replace("-", "_") for word in re.findall(r"--([a-z][a-z-]+)", TEXT)} - {"nproc_per_node", "class"}
    known = set(settings.flatten(GenerateCommand("x"))) | set(ConvertConfig.__dataclass_fields__)
    assert words <= known


def test_the_five_commands_of_the_wan_page_parse():
    text = (ROOT / "docs" / "wan.md").read_text()
    encode, plan, train, generate, export = (
        shlex.split(line)
        for line in re.findall(r"^    ((?:python (?:data_prep|launchers)|fvdm).*)$", text, re.MULTILINE)
    )
    settings.parse(EncodeConfig, encode[2:])
    settings.parse(PlanConfig, with_training_config(in_root(plan[2:])))
    assert settings.parse(TrainJobConfig, in_root(train[2:])).lora.rank == 128
    settings.parse(GenerateCommand, generate[2:])
    settings.parse(CheckpointCommand, export[2:], positional=("action", "run", "out"))
    known = set(settings.flatten(TrainConfig("x", DataConfig("x"))))
    assert set(re.findall(r"--(lora\.[a-z]+)", text)) <= known


def in_root(words):
    return [str(ROOT / word) if word.startswith("configs/") else word for word in words]


def test_the_pictures_are_there():
    for folder, text in (("docs", TEXT), (".", README)):
        pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
        assert pictures
        assert all((ROOT / folder / name).is_file() for name in pictures)
    assert "](docs/mlflow.png)" in README


def test_every_page_begins_with_what_one_can_do_after_it_and_is_in_the_index():
    pages = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "README.md"]
    index = (ROOT / "docs" / "README.md").read_text()
    for page in pages:
        lines = [line for line in page.read_text().splitlines() if line]
        assert lines[0].startswith("# ")
        assert lines[1].startswith("After this page you "), f"{page.name}: say what one can do after reading it"
        assert f"| [{page.name}]({page.name}) |" in index, f"{page.name} is not in docs/README.md"


def test_the_front_page_goes_from_what_it_is_to_what_it_shows():
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    order = ["Two commands", "What it does that others do not", "Train on your videos", "From Wan", "On Slurm"]
    order += ["Look at it", "One timestep per frame", "Read more"]
    assert headings == order
    assert README.index("docs/tasks.gif") < README.index("## Two commands")
    rows = re.findall(r"^\|.*\|$", README[README.index(order[1]) : README.index(order[2])], re.MULTILINE)
    assert {row.count(" | ") for row in rows if "---" not in row} == {5}, "a cell is missing"


def test_the_commands_of_the_readme_parse_and_come_after_the_environment():
    """Packages are in an environment of the project's own: a python before it is entered has none of them."""
    typed = re.findall(r"^    (.*(?:python|fvdm|torchrun|pip|activate).*)$", README, re.MULTILINE)
    assert typed[0] == "make install && . .venv/bin/activate"
    assert not [line for line in typed if line.startswith("pip ")]
    commands = [line for line in typed if "fvdm generate " in line]
    assert len(commands) >= 2
    for command in commands:
        settings.parse(GenerateCommand, shlex.split(command.partition("fvdm generate ")[2]))


def test_the_ten_answers_of_contributing_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| [^|]+\? \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 10
    for row in rows:
        files = [ROOT / name for name in re.findall(r"\]\(([^)]+)\)", row)]
        assert files
        assert all(file.exists() for file in files), row
        source = "".join(file.read_text() for file in files if file.is_file())
        for name in re.findall(r"`([A-Za-z_.]+)`", row):
            assert name.rpartition(".")[2] in source, f"{name} is not in {row}"
