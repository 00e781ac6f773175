"""What the documentation of the tasks says can be typed."""

import re
import shlex
from pathlib import Path

from fvdm import config as settings
from fvdm.convert import ConvertConfig
from fvdm.generate import GenerateConfig
from fvdm.matrices import TASKS
from fvdm.recipe import indices

TEXT = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()


def test_every_command_of_the_tasks_page_parses_and_every_task_has_one():
    commands = re.findall(r"-m fvdm\.generate (.*)", TEXT)
    parsed = [settings.parse(GenerateConfig, shlex.split(command)) for command in commands]
    assert {config.task for config in parsed} == set(TASKS)
    assert all(isinstance(indices(config.frames), tuple) for config in parsed)
    assert all(f"| `{task}` |" in TEXT for task in TASKS)


def test_every_option_that_the_tasks_page_names_exists():
    words = {word.replace("-", "_") for word in re.findall(r"--([a-z][a-z-]+)", TEXT)} - {"nproc_per_node", "class"}
    known = set(settings.flatten(GenerateConfig("x"))) | set(ConvertConfig.__dataclass_fields__)
    assert words <= known


def test_the_pictures_are_there():
    for name in re.findall(r"\((\w+\.png)\)", TEXT):
        assert (Path(__file__).parent.parent / "docs" / name).is_file()
