"""The table of a split's samples: an Arrow file that is mapped into memory, which the ranks of a node share."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

# Columns of the table; the number of an array in the tar is its first byte, -1 where the sample has no such array.
SCHEMA = {
    "key": "string",
    "source": "binary",  # a file name may hold bytes that are no text
    "frames": "int32",
    "bucket": "int16",
    "label": "int32",  # -1 without
    "fps": "float32",  # nan where unknown
    "first": "int32",  # window
    "length": "int32",
    "moments": "int64",
    "flip": "int64",
    "crc": "int64",
    "embeddings": "int64",
    "embeddings_crc": "uint32",
    "tokens": "list<int32>",
}


def arrow_schema() -> "pa.Schema":
    """`SCHEMA` as Arrow's."""
    import pyarrow as pa

    types = {"list<int32>": pa.list_(pa.int32())}
    return pa.schema([(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in SCHEMA.items()])


def write_index(path: Path, shards: Iterable[Iterable[dict[str, Any]]]) -> int:
    """Writes the table of a split; returns its number of rows.

    Args:
        path: the file to write; write it atomically, see `fvdm.files.atomic_write`.
        shards: the rows of each shard, in the order in which the manifest lists the shards.
    """
    import pyarrow as pa

    schema, rows = arrow_schema(), 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        pending: list[dict[str, Any]] = []
        for shard in shards:
            pending += shard
            if len(pending) >= 65_536:
                rows += _write(writer, pending, schema)
                pending = []
        rows += _write(writer, pending, schema)
    return rows


def _write(writer: Any, rows: list[dict[str, Any]], schema: "pa.Schema") -> int:
    import pyarrow as pa

    if rows:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return len(rows)


def read_index(path: Path) -> "pa.Table":
    """The table of a split, mapped into memory: what is not looked at takes no memory of its own.

    Raises:
        ValueError: it is not such a table.
        OSError: it cannot be read.
    """
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid:
        raise ValueError(f"{str(path)!r} is not a table of samples: copy it again.") from None
    if table.schema != arrow_schema():
        raise ValueError(f"{str(path)!r} has other columns than this version reads: encode the videos again.")
    return table


class Samples:
    """A table of samples by row, without copies: what is not looked at takes no memory.

    Args:
        table: of `arrow_schema()`.
    """

    def __init__(self, table: "pa.Table") -> None:
        """Touches no row."""
        self.table = table
        sizes = [len(chunk) for chunk in table.column("frames").chunks]
        self.starts = np.cumsum([0, *sizes])
        self._views: dict[str, list[np.ndarray]] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return self.table.num_rows

    def chunks(self, name: str) -> list[np.ndarray]:
        """A column of numbers, in pieces that begin at the rows `starts`."""
        if name not in self._views:
            # As `to_numpy`, which would load pandas, 25 MB.
            column = self.table.column(name)
            dtype = np.dtype(SCHEMA[name])
            pieces = [(np.frombuffer(chunk.buffers()[1], dtype), chunk.offset, len(chunk)) for chunk in column.chunks]
            self._views[name] = [values[offset : offset + length] for values, offset, length in pieces]
        return self._views[name]

    def number(self, name: str, row: int) -> int:
        """One number of a column of integers."""
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        return int(self.chunks(name)[chunk][row - self.starts[chunk]])

    def numbers(self, name: str, begin: int, end: int) -> np.ndarray:
        """The numbers of the rows from `begin` to before `end`."""
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        last = max(first + 1, int(np.searchsorted(self.starts, end, side="left")))
        pieces = zip(self.starts[first:last], self.chunks(name)[first:last], strict=True)
        return np.concatenate([values[max(0, begin - start) : end - start] for start, values in pieces])

    def value(self, name: str, row: int) -> Any:
        """One value of any column, as Python's."""
        value = self.table.column(name)[row].as_py()
        return os.fsdecode(value) if isinstance(value, bytes) else value
