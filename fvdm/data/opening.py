"""What is read when a folder of shards is opened: its manifest, the sizes of its shards, and the tables of samples."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fvdm.data import former
from fvdm.data.format import CLIP_FORMAT, ClipManifest, ClipShard, FormatError, IndexInfo
from fvdm.data.index import Samples, read_index
from fvdm.data.location import CorruptShardError, Location, MissingError, retry

if TYPE_CHECKING:
    import pyarrow as pa

Shard = ClipShard | former.ShardInfo
THREADS = 8
HASHED = 64 << 20  # bytes; a local table up to this size is checked against its checksum, a larger one by its size


def read_manifest(data: bytes, where: str) -> "ClipManifest | former.Manifest":
    """The manifest of either format.

    Args:
        data: JSON text.
        where: names it in errors.

    Raises:
        ValueError: not a manifest, of another format version, or with a value that cannot be.
    """
    try:
        fields = json.loads(data)
        found = fields["format"]
        if found == CLIP_FORMAT:
            return ClipManifest.from_dict(fields)
        if found == former.FORMAT:
            return former.Manifest.from_dict(fields)
    except FormatError as error:
        raise ValueError(
            f"{where} is not a valid manifest of latent shards: {error}. Encode the videos again."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{where} is not a manifest of latent shards: encode the videos again.") from None
    raise ValueError(
        f"{where} is of format {found!r}, this version reads {CLIP_FORMAT!r} and {former.FORMAT!r}: encode the videos "
        "again, or use the version of fvdm that made them."
    )


def check_sizes(location: Location, shards: Sequence[Shard]) -> None:
    """Compares the sizes of local shards with the manifest.

    Raises:
        CorruptShardError: a shard is missing or has another size.
    """

    def check_some(first: int) -> None:
        for shard in shards[first::THREADS]:
            check(shard)

    def check(shard: Shard) -> None:
        url = location.url(shard.name)
        try:
            size = retry(lambda: os.stat(url).st_size, url)
        except MissingError as error:
            raise CorruptShardError(f"Cannot read the shard {url!r}: {error}.") from None
        if size != shard.bytes:
            raise CorruptShardError(
                f"The shard {url!r} has {size} bytes, the manifest says {shard.bytes}: copy it again."
            )

    with ThreadPoolExecutor(THREADS) as pool:  # a shared file system answers many questions at once
        list(pool.map(check_some, range(THREADS)))


def open_samples(location: Location, manifest: ClipManifest | former.Manifest, shards: Sequence[Shard]) -> Samples:
    """The table of the samples of some shards, in their order.

    Raises:
        CorruptShardError: a table is missing, or is not the one that the manifest lists.
        UnreachableError: it cannot be read for a reason that may pass.
    """
    if isinstance(manifest, former.Manifest):
        rows = (row for shard in shards for row in _former_index(location, shard))
        return Samples(former.sample_table(rows))
    import pyarrow as pa

    chosen = {shard.name for shard in shards}
    pieces = []
    for index in manifest.indices:
        of_split = [shard for shard in manifest.shards if shard.split == index.split]
        if chosen.isdisjoint(shard.name for shard in of_split):
            continue
        table = _open_index(location, index)
        if all(shard.name in chosen for shard in of_split):
            pieces.append(table)
            continue
        row = 0
        for shard in of_split:
            if shard.name in chosen:
                pieces.append(table.slice(row, shard.samples))
            row += shard.samples
    if sum(len(piece) for piece in pieces) != sum(shard.samples for shard in shards):
        raise CorruptShardError(f"{location.url('manifest.json')!r} lists no table for some of its shards.")
    return Samples(pa.concat_tables(pieces))


def _open_index(location: Location, index: IndexInfo) -> "pa.Table":
    path, url = location.local(index.name, index.sha256), location.url(index.name)
    try:
        same = retry(lambda: os.stat(path).st_size, str(path)) == index.bytes
        if same and not location.remote and index.bytes <= HASHED:  # a remote file is checked when it arrives
            same = hashlib.sha256(retry(path.read_bytes, str(path))).hexdigest() == index.sha256
        table = retry(lambda: read_index(path), str(path)) if same else None
    except MissingError as error:
        raise CorruptShardError(f"Cannot read the table {url!r}: {error}. Copy it again.") from None
    if table is None or table.num_rows != index.rows:
        raise CorruptShardError(f"{url!r} is not the file that the manifest lists: copy it again.")
    return table


def _former_index(location: Location, shard: Any) -> list[dict[str, Any]]:
    name = former.index_name(shard.name)
    path = location.local(name, shard.index_sha256)
    try:
        data = retry(path.read_bytes, str(path))
    except MissingError as error:
        raise CorruptShardError(f"Cannot read the index {str(path)!r}: {error}. Copy it again.") from None
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise CorruptShardError(f"{location.url(name)!r} is not the file that the manifest lists: copy it again.")
    return list(json.loads(data)["samples"])
