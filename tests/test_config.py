import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from fvdm import config as settings
from fvdm.training.config import TrainConfig


@dataclass(frozen=True)
class Inner:
    """Inner settings.

    Attributes:
        rate: a number.
        kind: a word.
    """

    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    """Outer settings.

    Attributes:
        name: the name.
        inner: more.
        words: several.
    """

    name: str
    inner: Inner = field(default_factory=Inner)
    words: tuple[str, ...] = ("x",)


def test_words_override_files_which_override_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: file\ninner: {rate: 0.25, kind: b}\n")
    got = settings.parse(Outer, ["--config", str(file), "--inner.rate", "1e-3"])
    assert got == Outer("file", Inner(0.001, "b"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--name", "x", "--inner.rat", "1"], "did you mean inner.rate"),
        (["--name", "x", "--iner.rate", "1"], "did you mean inner.rate"),
        (["--name", "x", "--zzz", "1"], "--help lists them all"),
        (["--name", "x", "--inner.rate", "fast"], "inner.rate"),
        (["--name", "x", "--inner.kind", "c"], "inner.kind"),
        ([], "name"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(words, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        settings.parse(Outer, words)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_in_a_file_is_refused_with_the_nearest_name(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: file\ninner: {rte: 0.25}\n")
    with pytest.raises(ValueError, match=r"inner\.rte; did you mean inner\.rate"):
        settings.parse(Outer, ["--config", str(file)])


def test_what_is_saved_is_read_back(tmp_path):
    config = settings.parse(TrainConfig, ["--name", "n", "--data.path", "p", "--engine.lr", "3e-4"])
    settings.save(config, tmp_path / "c.yaml")
    assert settings.parse(TrainConfig, ["--config", str(tmp_path / "c.yaml")]) == config


def test_flattened_names_are_dotted():
    assert settings.flatten(Outer("n")) == {"name": "n", "inner.rate": 0.5, "inner.kind": "a", "words": ("x",)}


def help_of(cls, capsys, **words):
    with pytest.raises(SystemExit) as end:
        settings.parse(cls, ["--help"], **words)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_setting_is_explained(capsys):
    from fvdm.help import settings_of

    assert [setting.name for setting in settings_of(TrainConfig) if not setting.text] == []
    text = help_of(TrainConfig, capsys, prog="python train.py")
    assert text.startswith("usage: python train.py --name NAME --data.path PATH [options]\n")
    assert len(re.findall(r"^  --", text, re.M)) > 50


@dataclass(frozen=True)
class Base:
    """What is read.

    Attributes:
        folder: where it is.
        flip: store the flipped copy.
    """

    folder: str = "here"
    flip: bool | None = None


@dataclass(frozen=True)
class Command(Base):
    """A command.

    Attributes:
        kind: what to do.
        names: 100% of them [all of them]
        rate: a number.
        on: a switch.
        inner: more.
    """

    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = field(default=(), metadata={"metavar": "WORD"})
    rate: float = 2.0
    on: bool = False
    inner: Inner = field(default_factory=Inner)


def test_help_shows_each_default_once_and_groups_what_belongs_together(capsys):
    text = help_of(Command, capsys, prog="fvdm command", positional=("kind",), description="Does it.")
    assert text.startswith("usage: fvdm command KIND [options]\n\nDoes it.\n")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        *("options:", "What is read:", "Inner settings:", "--folder FOLDER where it is [here]"),
        *("--flip, --no-flip store the flipped copy", "KIND what to do [a]", "--rate X a number [2]", "--on a switch"),
        *(
            "--names WORD [WORD ...] 100% of them [all of them]",
            "--inner.kind {a,b} a word [a]",
            "--inner.rate X a number [0.5]",
        ),
    ):
        assert line in lines
    assert not re.search(r"\(type|print_config|default:", text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["b", "--no-flip"], Command(kind="b", flip=False)),
        (["--flip", "--on"], Command(flip=True, on=True)),
        (["--flip=false"], Command(flip=False)),
        (["--names", "a=1", "2", "--rate", "3"], Command(names=("a=1", "2"), rate=3.0)),
        (["--names", "[a, b]"], Command(names=("a", "b"))),
    ],
)
def test_switches_and_lists(words, expected):
    assert settings.parse(Command, words, positional=("kind",)) == expected


@pytest.mark.parametrize("words", [["--no-rate"], ["--no-nothing"], ["--no-flip", "x"]])
def test_only_switches_are_turned_off(words):
    with pytest.raises(ValueError, match=r"setting|argument|flip"):
        settings.parse(Command, words)


@pytest.mark.parametrize("name", ["demo", "ffs_xl", "sky_xl", "ucf101_xl", "taichi_xl"])
def test_shipped_configurations_are_valid(name):
    from pathlib import Path

    path = Path(__file__).parent.parent / "configs" / f"{name}.yaml"
    config = settings.parse(TrainConfig, ["--config", str(path)])
    assert config.name == name


@dataclass(frozen=True)
class Handy:
    """Settings with long names.

    Attributes:
        class_: a word that Python keeps for itself.
        show_matrix: a switch.
        given_noise: a number.
    """

    class_: str = ""
    show_schedule: bool = False
    given_noise: int = 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--class", "dog"], Handy("dog")),
        (["--class=dog"], Handy("dog")),
        (["--show-matrix"], Handy(show_schedule=True)),
        (["--show-matrix", "false"], Handy(show_schedule=False)),
        (["--show_matrix", "--given-noise", "5"], Handy(show_schedule=True, given_noise=5)),
        (["--given-noise=-5"], Handy(given_noise=-5)),
        (["--class", "--show-matrix"], None),
    ],
)
def test_options_may_be_typed_with_dashes_and_switches_without_a_value(words, expected):
    if expected is None:
        with pytest.raises(ValueError, match="class"):
            settings.parse(Handy, words)
    else:
        assert settings.parse(Handy, words) == expected


def test_a_setting_with_an_underscore_at_its_end_is_saved_and_read_back(tmp_path):
    settings.save(Handy("cat"), tmp_path / "c.yaml")
    assert settings.parse(Handy, ["--config", str(tmp_path / "c.yaml")]) == Handy("cat")


def test_a_flat_configuration_has_every_setting_by_its_dotted_name():
    flat = settings.flatten(Outer("x", Inner(kind="b"), ("y",)))
    assert flat == {"name": "x", "inner.rate": 0.5, "inner.kind": "b", "words": ("y",)}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("p", "2", "p is 2.0: it must be between 0 and 1"),
        ("ema_decay", "2", "ema_decay is 2.0"),
        ("condition_dropout", ".nan", "condition_dropout is nan"),
        ("steps", "-5", "steps is -5: it must be at least 1"),
        ("seed", "-1", "seed is -1"),
        ("log_every", "0", "log_every is 0"),
        ("stop_every", "0", "stop_every is 0"),
        ("max_skipped", "0", "max_skipped is 0"),
        ("engine.lr", "-1", "engine.lr is -1.0: it must be at least 0"),
        ("engine.betas", "[0.9, 1.1]", r"engine.betas is \(0.9, 1.1\): it must be between 0 and 1"),
        ("engine.timeout", "0", "engine.timeout is 0"),
        ("checkpoint.every", "0", "checkpoint.every is 0"),
        ("checkpoint.keep_last", "0", "checkpoint.keep_last is 0"),
        ("previews.num", "0", "previews.num is 0"),
        ("previews.fps", "0", "previews.fps is 0.0"),
        ("name", "", "name is empty"),
    ],
)
def test_a_training_setting_out_of_its_range_is_refused_in_one_sentence(name, value, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        settings.parse(TrainConfig, ["--name", "n", "--data.path", "p", f"--{name}={value}"])
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Several:
    """Settings that take several values.

    Attributes:
        names: words.
        p: numbers.
        pair: two numbers.
        on: a switch.
    """

    names: tuple[str, ...] = ()
    p: tuple[float, ...] = (1.0,)
    pair: tuple[float, float] = (0.0, 1.0)
    on: bool = False


def test_a_setting_of_several_values_takes_them_as_words():
    found = settings.parse(Several, ["--names", "a", "1", "--p", "0", "0.5", "--on", "--pair", "[2, 3]"])
    assert found == Several(("a", "1"), (0.0, 0.5), (2.0, 3.0), True)
    assert settings.parse(Several, ["--names", "[a, b]", "--p=[3]"]) == Several(("a", "b"), (3.0,))
    assert settings.parse(Several, ["--names", "a=b", "--on=false"]) == Several(("a=b",))
