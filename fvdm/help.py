"""The text of `--help`, made from a dataclass of settings and its docstrings. Imports nothing heavy."""

import argparse
import dataclasses
import shutil
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WIDTH = 110  # columns at most


@dataclass(frozen=True)
class Setting:
    """One setting, as `--help` shows it.

    Attributes:
        name: dotted, as in YAML.
        group: title of the group of settings that it belongs to.
        type: its type.
        default: its default value; `dataclasses.MISSING` where it must be given.
        text: what it does.
        metavar: stands for its value; empty for one made from the type.
    """

    name: str
    group: str
    type: Any
    default: Any
    text: str
    metavar: str = ""


def settings_of(cls: type[Any], prefix: str = "", group: str = "") -> Iterator[Setting]:
    """The settings of a dataclass and of the dataclasses in it, in order.

    Settings that a dataclass inherits form a group of their own, under the first line of the docstring of the class
    that defines them.
    """
    types_of = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = types_of[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from settings_of(kind, f"{prefix}{field.name}.", group or _title(kind))
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        owner = next(base for base in cls.__mro__ if field.name in vars(base).get("__annotations__", {}))
        title = group or (_title(owner) if owner is not cls or prefix else "options")
        text = _attributes(owner).get(field.name, "")
        yield Setting(prefix + field.name, title, kind, default, text, field.metadata.get("metavar", ""))


def _title(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _attributes(cls: type[Any]) -> dict[str, str]:
    """Text of each attribute in the docstring of a class."""
    from docstring_parser import DocstringStyle, parse

    documented = parse(cls.__doc__ or "", style=DocstringStyle.GOOGLE).params
    return {item.arg_name: " ".join((item.description or "").split()).rstrip(".") for item in documented}


def option_name(name: str) -> str:
    """The option of a setting: with dashes, and without the underscore that ends a word that Python reserves."""
    return "--" + name.rstrip("_").replace("_", "-")


def switch_of(kind: Any) -> bool:
    """Whether a setting is a switch: bool, or bool that may be left open."""
    members = [member for member in _members(kind) if member is not type(None)]
    return members == [bool]


def list_of(kind: Any) -> Any:
    """Type of the values of a setting that takes several, `tuple[T, ...]` or `list[T]`; None for other settings."""
    members = [member for member in _members(kind) if member is not type(None)]
    if len(members) == 1 and get_origin(members[0]) in (tuple, list):
        inner = [kind for kind in get_args(members[0]) if kind is not Ellipsis]
        return inner[0] if inner and len(set(inner)) == 1 else None
    return None


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def help_text(
    cls: type[Any], prog: str, description: str | None = None, positional: Sequence[str] = (), config: bool = True
) -> str:
    """The text that `--help` prints.

    Args:
        cls: the dataclass of the settings.
        prog: what is typed to run the command.
        description: what the command does.
        positional: settings that the first words give without their names.
        config: the command takes `--config FILE.yaml`.
    """
    settings = list(settings_of(cls))
    width = min(WIDTH, shutil.get_terminal_size().columns)
    parser = argparse.ArgumentParser(
        prog,
        usage=_usage(prog, settings, positional),
        description=description,
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width),
    )
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(["options", *_titles(settings)])}
    if config:
        groups["options"].add_argument(
            "--config", metavar="FILE", help="YAML file of settings; options after it override it"
        )
    for setting in settings:
        _add(groups[setting.group], setting, setting.name in positional)
    groups["options"].add_argument("--help", action="store_true", help="show this text")
    return parser.format_help()


def _titles(settings: Sequence[Setting]) -> list[str]:
    return [setting.group for setting in settings]


def _usage(prog: str, settings: Sequence[Setting], positional: Sequence[str]) -> str:
    words = [name.upper() for name in positional]
    for setting in settings:
        if setting.default is dataclasses.MISSING and setting.name not in positional:
            words.append(f"{option_name(setting.name)} {_metavar(setting)}")
    return " ".join([prog, *words, "[options]"])


def _add(group: Any, setting: Setting, positional: bool) -> None:
    text = setting.text
    if setting.default is dataclasses.MISSING:
        text = text if positional else f"{text} (required)"
    elif not text.endswith("]"):
        shown = _shown(setting.default)
        text += f" [{shown}]" if shown else ""
    text = text.replace("%", "%%")
    if positional:
        group.add_argument(setting.name, metavar=setting.name.upper(), help=text)
    elif switch_of(setting.type):
        name = option_name(setting.name)
        head, _, leaf = name.rpartition(".")
        no = f"{head}.no-{leaf}" if head else f"--no-{leaf[2:]}"
        names = [name] if setting.default is False else [name, no]
        group.add_argument(*names, action="store_true", dest=setting.name, help=text)
    else:
        more = {"nargs": "+"} if list_of(setting.type) else {}
        group.add_argument(option_name(setting.name), metavar=_metavar(setting), help=text, **more)


def _metavar(setting: Setting) -> str:
    if setting.metavar:
        return setting.metavar
    kind = next((member for member in _members(setting.type) if member is not type(None)), str)
    if get_origin(kind) is Literal:
        return "{" + ",".join(str(value) for value in get_args(kind) if value != "") + "}"
    if kind in (int, float):
        return "N" if kind is int else "X"
    return setting.name.rpartition(".")[2].rstrip("_").upper()


def _shown(default: Any) -> str:
    if default is True:
        return "on"
    if default is None or default is False or default in ("", ()):
        return ""
    if isinstance(default, tuple | list):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)
