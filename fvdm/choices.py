"""Things that are chosen by name, such as a task or a solver."""

from collections.abc import Collection


def one_of(what: str, name: str, names: Collection[str]) -> str:
    """The name, if there is such a thing; it is then a key of a table of them.

    Args:
        what: what it names, for the message.
        name: the name that was given.
        names: those that there are.

    Raises:
        ValueError: if it is none of them; lists them.
    """
    if name not in names:
        raise ValueError(f"{what} {name!r} is unknown; choose one of {', '.join(names)}")
    return name
