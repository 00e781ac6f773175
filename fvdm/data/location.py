"""Where latent shards are: local folders, shared file systems, and URLs."""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fvdm.data.cache import ShardCache

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_DELAYS = (1.0, 4.0, 16.0)  # seconds between tries
TIMEOUT = 60.0  # seconds that a server may be silent
BLOCK = 1 << 20  # bytes
REMOVED = 10  # times in a row that a shard may be removed from the cache before it is open
NOT_FOUND = 22  # exit status of `pipe:curl -f` where a server does not have a file, or does not give it
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp"}


class CorruptShardError(ValueError):
    """A shard whose bytes are not those that were written; the message names the shard."""


class MissingError(ValueError):
    """A file that is not there, or may not be read; the message is the reason."""


class UnreachableError(OSError):
    """A file that cannot be read for a reason that may pass (a disk, a network, a server), after several tries."""


def retry(read: Callable[[], T], what: str, missing: int | None = None) -> T:
    """Reads, and where that fails for a reason that may pass, tries again after a while.

    Args:
        read: what to do; each call starts from the beginning.
        what: name of the file, for the message.
        missing: exit status by which a command says that there is no such file.

    Raises:
        MissingError: at once, if the file is not there.
        UnreachableError: the last try has failed too.
    """
    for wait in (*RETRY_DELAYS, None):
        try:
            return read()
        except UnreachableError:
            raise
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise MissingError((error.strerror or "no such file").lower()) from None
        except OSError as error:
            status = re.search(r": exit (-?\d+) \(read\)", str(error))  # of a pipe of webdataset's
            if status and int(status[1]) == missing:
                raise MissingError("the server does not have it, or refuses it") from None
            reason = f"its command ended with exit status {status[1]}" if status else error.strerror or str(error)
            if wait is None:
                raise UnreachableError(
                    f"Cannot read {what!r} ({reason}), in {len(RETRY_DELAYS) + 1} tries over {sum(RETRY_DELAYS):g} s: "
                    "check the disk, the network or the server, and start again."
                ) from None
        log.warning("cannot read %r (%s), trying again in %.0f s", what, reason, wait)
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


@contextmanager
def translate_errors() -> Iterator[None]:
    """What the clients of object stores raise, as an OSError: PermissionError where the server refuses for good."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, MemoryError):
        raise
    except Exception as error:  # each client has its own classes, which need not be installed
        status = getattr(error, "status", None)
        if status in (401, 403, 410):
            raise PermissionError(status, f"the server refuses it, status {status}") from None
        reason = f"status {status}" if status else " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(reason) from None


def open_url(url: str) -> BinaryIO:
    """The bytes behind a URL that fsspec knows (http, s3, gs, hf, memory, ...), as a stream.

    Raises:
        ValueError: no such kind of URL, or its package is not installed.
        OSError: it cannot be read.
    """
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    try:
        file_system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError:
        package = PACKAGES.get(protocol, f"fsspec[{protocol}]")
        raise ValueError(f"{protocol}:// needs the package {package}: pip install {package}") from None
    except ValueError:
        raise ValueError(f"{url!r} is of no kind that fsspec knows; use http, s3, gs, hf or pipe:COMMAND.") from None
    with translate_errors():
        # Of http one stream, without asking for the size first; of the others large blocks.
        reading = {"block_size": 0, "size": 1} if options else {"block_size": 16 * BLOCK, "cache_type": "readahead"}
        return file_system.open(path, "rb", **reading)


class Location:
    """Where shards are: a folder, a URL of a folder, or URLs of tars with braces.

    Args:
        path: folder or URL; `pipe:COMMAND` names the tar in the command.
        cache: folder for fetched files.
        cache_gb: most gigabytes of shards in that folder; 0 for no bound.
    """

    def __init__(self, path: str, cache: str | None = None, cache_gb: float = 0.0) -> None:
        """Fetches nothing yet."""
        self.path = os.fspath(path)
        folder = Path(cache or os.environ.get("FVDM_CACHE") or Path.home() / ".cache" / "fvdm" / "shards")
        self.cache = ShardCache(folder, int(cache_gb * 1e9))
        self.template, self.names = self._parse()
        self.remote = re.match(r"^(pipe:|[a-z0-9]+://)", self.template) is not None
        if self.template.startswith("file:"):
            self.template, self.remote = re.sub(r"^file:(//)?", "", self.template), False

    def _parse(self) -> tuple[str, set[str] | None]:
        """The URL with `\\0` in place of the file's name, and the names asked for (None: all)."""
        if not re.search(r"\.tar\b", self.path):
            if self.path.startswith("pipe:"):
                raise ValueError(f"{self.path!r} names no .tar: write the command for one shard, or {{0..9}} for many.")
            return self.path.rstrip("/") + "/\0", None
        from webdataset.shardlists import expand_urls

        pattern = r"[^/\s'\"=]+\.tar\b"
        urls = expand_urls(self.path)
        names = {re.findall(pattern, url)[-1] for url in urls}
        templates = {"\0".join(url.rsplit(re.findall(pattern, url)[-1], 1)) for url in urls}
        if len(templates) != 1:
            raise ValueError(f"{self.path!r}: the shards must be in one folder; encode into one, or merge the folders.")
        return templates.pop(), names

    def url(self, name: str) -> str:
        """Path or URL of a file beside the shards."""
        return self.template.replace("\0", name)

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises:
            ValueError: it is not there.
            UnreachableError: it cannot be read for another reason.
        """

        def read() -> bytes:
            with translate_errors(), self._open(name) as stream:
                return stream.read()

        try:
            return retry(read, self.url(name), NOT_FOUND)
        except MissingError as error:
            raise ValueError(
                f"Cannot read {self.url(name)!r} ({error}): is {self.path!r} a folder that "
                "encode_latents.py wrote to the end?"
            ) from None

    def local(self, name: str, sha256: str, size: int = 0) -> Path:
        """Path of a file on this machine, fetched if it is remote. Safe to call from many processes at once.

        Args:
            name: of the file.
            sha256: of its bytes; 64 hexadecimal digits.
            size: in bytes, for which room is made in the cache first.

        Raises:
            CorruptShardError: what arrived is not what the manifest promises.
            ValueError: it is not there.
            UnreachableError: it cannot be fetched for another reason.
        """
        if not self.remote:
            return Path(self.url(name))
        return self.cache.get(self.key(name, sha256), size, lambda path: self._fetch(name, sha256, path))

    def open(self, name: str, sha256: str, size: int) -> int:
        """A file descriptor of a shard; see `local` for what it takes and raises."""
        if not self.remote:
            return os.open(self.url(name), os.O_RDONLY)
        for _ in range(REMOVED):
            with suppress(FileNotFoundError):  # another process took its room in the cache before it was open
                return os.open(self.local(name, sha256, size), os.O_RDONLY)
        raise OSError(f"{str(self.cache.folder)!r} is too small for the processes that read at the same time")

    def prefetch(self, name: str, sha256: str, size: int) -> bool:
        """Fetches a shard ahead of its use, unless there is no room or another process is fetching it.

        Returns:
            Whether the shard is in the cache.
        """
        return self.cache.prefetch(self.key(name, sha256), size, lambda path: self._fetch(name, sha256, path))

    def cached(self, name: str, sha256: str) -> bool:
        """Whether a remote file is in the cache."""
        return (self.cache.folder / self.key(name, sha256)).exists()

    @staticmethod
    def key(name: str, sha256: str) -> str:
        """Name of a file in the cache."""
        return sha256 + os.path.splitext(name)[1]

    def _fetch(self, name: str, sha256: str, to: Path) -> int:
        """Writes the file to a path that exists; returns its size."""

        def fetch() -> tuple[str, int]:
            digest = hashlib.sha256()
            with translate_errors(), self._open(name) as stream, to.open("r+b") as file:
                while block := stream.read(BLOCK):
                    digest.update(block)
                    file.write(block)
                file.truncate()
                return digest.hexdigest(), file.tell()

        try:
            found, size = retry(fetch, self.url(name))
        except MissingError as error:
            raise ValueError(f"Cannot fetch {self.url(name)!r} to {str(self.cache.folder)!r}: {error}.") from None
        if found != sha256:
            raise CorruptShardError(f"{self.url(name)!r} is not the file that the manifest lists: copy it again.")
        return size

    def _open(self, name: str) -> BinaryIO:
        url = self.url(name)
        if not self.remote:
            return open(url, "rb")
        if url.startswith("pipe:"):
            from webdataset.gopen import gopen

            return gopen(url)
        return open_url(url)
