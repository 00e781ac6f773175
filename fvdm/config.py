"""Typed settings from YAML files and dotted words of the command line, strictly: no unknown key, no wrong type."""

import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fvdm.files import write_text
from fvdm.help import help_text, list_of, option_name, settings_of, switch_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")

# Former name of a setting -> its name now. The former ones are accepted for one release.
FORMER_NAMES = {
    "data.interval": "data.stride",
    "interval": "stride",
    "recompute": "activation_checkpointing",
    "engine.clip": "engine.grad_clip",
    "engine.clip_from": "engine.grad_clip_start",
    "engine.bucket": "engine.reduce_bucket_size",
    "show_matrix": "show_schedule",
    "keep_damaged": "keep_corrupt",
    "class_dropout": "condition_dropout",
}


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    positional: Sequence[str] = (),
    prog: str | None = None,
    defaults: T | None = None,
) -> T:
    """Fill a dataclass from `--config FILE.yaml` and `--dotted.name value`; later words win.

    `--given-noise` is the same as `--given_noise`; a switch needs no value, and `--no-NAME` turns it off; a setting
    that takes several values takes the words up to the next option. `--help` prints what `fvdm.help` makes of the
    dataclass, and ends the program.

    Args:
        cls: a frozen dataclass; its fields may be dataclasses. Its docstrings are the text of `--help`.
        argv: the words; those of the command line when not given.
        description: what the program does.
        positional: settings that the first words give without their names.
        prog: what is typed to run the program; the name of its file when not given.
        defaults: values in place of the dataclass's own defaults.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: for an unknown or ill-typed setting; names the nearest that exists.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(help_text(cls, prog or Path(sys.argv[0]).name, description, positional), end="")
        raise SystemExit(0)
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; words after it override it")
    parser.add_class_arguments(cls)
    if defaults is not None:
        parser.set_defaults(plain(defaults))
    _shorten(parser)
    try:
        named = [f"--{name}={word}" for name, word in zip(positional, words, strict=False) if word[:1] != "-"]
        values = parser.parse_args(_words(parser, _rename_words(parser, named + words[len(named) :])))
        values.pop("config", None)
        return cls(**vars(parser.instantiate(values)))
    except ArgumentError as error:
        raise ValueError(_explain(str(error), _names(parser.get_defaults()))) from None


def parse_small(cls: type[T], argv: Sequence[str] | None, description: str | None, small: Callable[[T], T]) -> T:
    """As `parse`, of a dataclass with a switch `smoke`: with it, other defaults, which show only that all works.

    Args:
        cls: the dataclass.
        argv: the words; those of the command line when not given.
        description: what the program does.
        small: from the settings that are given, and the usual defaults, to the settings of `--smoke`.

    Raises:
        ValueError: as `parse`.
    """
    config = parse(cls, argv, description)
    return parse(cls, argv, defaults=small(config)) if config.smoke else config  # type: ignore[attr-defined]


def join_repeated(words: Sequence[str], name: str) -> list[str]:
    """Words in which all values of an option that may be repeated stand in one.

    Args:
        words: of a command line.
        name: of a setting that takes several values.
    """
    values: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == f"--{name}":
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
        elif word.startswith(f"--{name}="):
            values.append(word.partition("=")[2])
        else:
            others.append(word)
    return [f"--{name}={json.dumps(values)}", *others] if values else others


def split_words(cls: type[Any], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that set the fields of a dataclass, and `--help`; then all others, which are another program's."""
    options = [(option_name(setting.name), setting.type) for setting in settings_of(cls)]
    names = {name for name, _ in options} | {
        name.replace("--", "--no-", 1) for name, kind in options if switch_of(kind)
    }
    own: list[str] = []
    others: list[str] = []
    target = others
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit():
            target = own if word.partition("=")[0].replace("_", "-") in names | {"--help", "-h"} else others
        target.append(word)
    return own, others


def _shorten(parser: "ArgumentParser") -> None:
    """A field that had to be called `class_` is the option `--class`."""
    for action in list(parser._actions):
        for option in [option for option in action.option_strings if option.endswith("_")]:
            short = option.rstrip("_")
            action.option_strings = [short]
            parser._option_string_actions[short] = parser._option_string_actions.pop(option)


def _words(parser: "ArgumentParser", argv: list[str]) -> list[str]:
    """`--given_noise` for `--given-noise`, true or false for a switch, and one list for several values."""
    words: list[str] = []
    options = parser._option_string_actions
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        own = name.replace("-", "_").replace("__", "--", 1)
        if not name.startswith("--") or own not in options:
            on = re.sub(r"^(--(?:.*\.)?)no_", r"\1", own)
            off = name.startswith("--") and not equals and switch_of(getattr(options.get(on), "_typehint", None))
            words.append(f"{on}=false" if off else word)
            continue
        kind = getattr(options[own], "_typehint", None)
        values = 0 if equals else next((k for k, other in enumerate(rest) if other.startswith("--")), len(rest))
        if not equals and not values and switch_of(kind):
            words.append(f"{own}=true")
        elif list_of(kind) and values and not (values == 1 and rest[0].startswith("[")):
            quote = str if list_of(kind) in (int, float) else json.dumps
            words.append(f"{own}=[{', '.join(quote(other) for other in rest[:values])}]")
            del rest[:values]
        else:
            words.append(own + equals + value)
    return words


def current_names(values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Settings that an earlier version wrote, nested or dotted, under the names that they have now."""
    renamed = {}
    for key, value in values.items():
        name = FORMER_NAMES.get(section + key, section + key).removeprefix(section)
        renamed[name] = current_names(value, f"{section}{key}.") if isinstance(value, dict) else value
    return renamed


def _rename_words(parser: "ArgumentParser", words: list[str]) -> list[str]:
    """Words, and YAML files, with former names of settings replaced; says so on stderr."""
    import yaml

    options = parser._option_string_actions
    renamed = []
    for k, word in enumerate(words):
        name, equals, value = word.partition("=")
        new = FORMER_NAMES.get(name.removeprefix("--").replace("-", "_"), "")
        if name.startswith("--") and name not in options and f"--{new}" in options:
            _say_renamed(name.removeprefix("--"), new)
            word = f"--{new}{equals}{value}"
        path = value if name == "--config" and equals else word if k and words[k - 1] == "--config" else ""
        if path and Path(path).is_file():
            before = yaml.safe_load(Path(path).read_text())
            after = current_names(before) if isinstance(before, dict) else before
            if after != before:
                for old, new in FORMER_NAMES.items():
                    if _has(before, old):
                        _say_renamed(f"{old} in {path}", new)
                # jsonargparse takes the content of a file in place of its name.
                word = word.removesuffix(path) + yaml.safe_dump(after, sort_keys=False)
        renamed.append(word)
    return renamed


def _say_renamed(old: str, new: str) -> None:
    print(f"the setting {old} is now called {new}; the former name will go away in the next release", file=sys.stderr)


def _has(values: Any, dotted: str) -> bool:
    key, _, rest = dotted.partition(".")
    return isinstance(values, dict) and key in values and (not rest or _has(values[key], rest))


def _names(defaults: "Namespace") -> list[str]:
    return [name for name in defaults.keys() if name not in ("config", "help", "print_config")]  # noqa: SIM118


def _explain(message: str, names: list[str]) -> str:
    """One sentence for a rejected setting, with the nearest name where the name was wrong."""
    unknown = re.search(r"unrecognized arguments: -*([^\s=]+)|[Oo]ption '([^']+)' is not accepted", message)
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    if not unknown and not group:
        return " ".join(message.replace("Parser key ", "setting ").split())
    word = f"{group[1]}.{group[2]}" if group else unknown[1] or unknown[2]  # type: ignore[index]
    leaves = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(word, names, 1, 0.5)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], leaves, 1, 0.5)]
    hint = f"did you mean {near[0]}?" if near else "--help lists them all"
    return f"there is no setting {word}; {hint}"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A dataclass as `{"dotted.name": value}`, for logging."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        flat |= flatten(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return flat


def sides_of(size: int | str) -> tuple[int, int]:
    """(height, width) in pixels of a size as it is written: a number is the side of a square, a word such as 480x832.

    Raises:
        ValueError: a word is of another form, or a side in it is 0.
    """
    if isinstance(size, int):
        return size, size
    numbers = size.strip().lower().split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"{size!a} is no shape: write height x width in pixels, such as 480x832.")
    return int(numbers[0]), int(numbers[1])


def in_range(config: Any, section: str = "", **ranges: tuple[float, float]) -> None:
    """Refuse settings out of their range.

    Args:
        config: a dataclass.
        section: under which name it stands in the whole, such as `data`.
        ranges: lowest and highest value of a setting, or of each of its numbers.

    Raises:
        ValueError: names the setting, its value and what it may be.
    """
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        # Written so that nan is refused as well.
        if not all(low <= number <= high for number in (value if isinstance(value, tuple) else (value,))):
            allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"{section}{'.' * bool(section)}{name} is {value}: it must be {allowed}.")


def save(config: Any, path: Path) -> None:
    """Write a dataclass as YAML that `parse` reads back, atomically."""
    import yaml

    write_text(path, yaml.safe_dump(plain(config), sort_keys=False))


def plain(value: Any) -> Any:
    """A dataclass as dictionaries, lists and numbers, for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def fail(error: Exception | str) -> NoReturn:
    """End the program for a user's mistake: the sentence on stderr, exit code 2, no traceback."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
