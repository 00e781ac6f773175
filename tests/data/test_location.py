"""Shards that cannot be read for a while: a server, a network or a disk that fails and comes back, or does not."""

import errno
import http.server
import importlib.util
import itertools
import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from fvdm.data import location
from fvdm.data.config import DataConfig
from fvdm.data.loader import batches
from fvdm.data.location import CorruptShardError, Location, UnreachableError, retry
from fvdm.data.shards import LatentShards
from tests.data_fixtures import make_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), [20, 17, 18, 16])


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """What was waited for between tries; nothing is, here."""
    waited = []
    monkeypatch.setattr(location, "time", SimpleNamespace(sleep=waited.append))
    return waited


def failing_pipe(tmp_path, folder, times, name="train-"):
    """A source whose command fails a number of times for each file named so, half-way, and then works."""
    script = tmp_path / "fetch.sh"
    script.write_text(
        f'file="{folder}/$1"; tries="{tmp_path}/tries-$1"\n'
        f'case "$1" in *{name}*) echo >> "$tries"\n'
        f'  [ "$(wc -l < "$tries")" -le {times} ] && {{ head -c 1000 "$file"; exit 7; }} ;; esac\n'
        'exec cat "$file"\n'
    )
    return f"pipe:sh {script} train-{{000000..000001}}.tar"


def read_all(shards):
    return [shards.read(video, np.arange(shards.frames[video])).tobytes() for video in range(len(shards))]


def tries(tmp_path):
    return {path.name.removeprefix("tries-"): len(path.read_text()) for path in tmp_path.glob("tries-*")}


@pytest.mark.parametrize("name", ["manifest.json", "index.json", ".tar", ""])
def test_a_source_that_fails_twice_and_then_works(folder, tmp_path, waits, name):
    remote = LatentShards(failing_pipe(tmp_path, folder, 2, name), cache=str(tmp_path / "cache"))
    assert read_all(remote) == read_all(LatentShards(folder))
    assert set(tries(tmp_path).values()) == {3}
    assert waits[:2] == [1.0, 4.0]
    assert not list((tmp_path / "cache").glob(".tmp-*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_never_works_stops_training_with_one_sentence(folder, tmp_path, workers):
    """As an OSError, which a job takes for a reason to start again, out of a loader's worker too."""
    shards = LatentShards(failing_pipe(tmp_path, folder, 99, ".tar"), cache=str(tmp_path / "cache"))
    stream = batches(shards, DataConfig("", batch_size=2, workers=workers, corrupt="skip"))
    with pytest.raises(
        UnreachableError, match=r"^Cannot read '.*train-00000.\.tar' \(its command ended with"
    ) as caught:
        list(itertools.islice(stream, 4))
    assert "exit status 7), in 4 tries over 21 s" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert not isinstance(caught.value, ValueError)
    assert not list((tmp_path / "cache").glob("*.tar"))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers with an error, or ends in the middle of a file, as often as `failures` says, then serves."""

    failures = 0
    how: int | str = 503

    def do_GET(self):
        if Handler.failures:
            Handler.failures -= 1
            if isinstance(Handler.how, int):
                self.send_error(Handler.how)
                return
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder):
    handler = type("Here", (Handler,), {"__init__": lambda self, *a: Handler.__init__(self, *a, directory=str(folder))})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", [500, 503, 429, "cut"])
def test_a_web_server_that_fails_twice_and_then_works(folder, server, tmp_path, waits, how):
    remote = LatentShards(server, cache=str(tmp_path))
    Handler.failures, Handler.how = 2, how
    assert read_all(remote) == read_all(LatentShards(folder))
    assert waits == [1.0, 4.0]


def test_a_web_server_that_is_gone_and_a_page_that_is_not_there(server, tmp_path, waits):
    with pytest.raises(ValueError, match=r"Cannot read .*nothing/manifest.json' \(no such file\)"):
        LatentShards(f"{server}/nothing", cache=str(tmp_path))
    assert not waits
    with pytest.raises(UnreachableError, match=r"Cannot read 'http://127.0.0.1:9/manifest.json' \(Conn.* in 4 tries"):
        LatentShards("http://127.0.0.1:9", cache=str(tmp_path))
    assert len(waits) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_web_server_that_refuses(server, tmp_path, waits, status):
    Handler.failures, Handler.how = 1, status
    with pytest.raises(ValueError, match=r"Cannot read 'http.*manifest.json' \(.*\): is 'http.*' a folder that"):
        LatentShards(server, cache=str(tmp_path))
    assert not waits
    assert not Handler.failures


def test_urls_that_fsspec_knows(folder, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    remote = LatentShards("memory://bucket", cache=str(tmp_path))
    assert read_all(remote) == read_all(LatentShards(folder))
    assert len(list(tmp_path.glob("*.tar"))) == len(remote.shards)
    with pytest.raises(ValueError, match=r"Cannot read 'memory://nothing/manifest.json' \("):
        LatentShards("memory://nothing", cache=str(tmp_path))


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_what_a_url_needs_is_said_in_one_sentence(tmp_path, protocol, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"^{protocol}:// needs the package {package}: pip install {package}$"):
        LatentShards(f"{protocol}://bucket/latents", cache=str(tmp_path))
    with pytest.raises(ValueError, match="is of no kind that fsspec knows"):
        LatentShards("gopher://bucket/latents", cache=str(tmp_path))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_shared_file_system_that_comes_back(folder, monkeypatch, waits, number):
    shards = LatentShards(folder)
    expected = read_all(shards)
    pread, opened, failures = os.pread, set(), [2]

    def failing(file, size, offset):
        opened.add(os.fstat(file).st_ino)
        if failures[0]:
            failures[0] -= 1
            raise OSError(number, os.strerror(number))
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert read_all(shards) == expected
    assert waits == [1.0, 4.0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("corrupt", ["stop", "skip"])
def test_a_shared_file_system_that_stays_away_is_no_damage(folder, monkeypatch, workers, corrupt):
    def failing(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    shards = LatentShards(folder)
    monkeypatch.setattr(os, "pread", failing)
    stream = batches(shards, DataConfig(str(folder), batch_size=2, workers=workers, corrupt=corrupt))
    with pytest.raises(UnreachableError, match=r"Cannot read '.*\.tar' \(Stale file handle\), in 4 tries"):
        next(stream)


def test_no_file_is_left_open_by_a_failure(folder, monkeypatch):
    shards = LatentShards(folder)
    before = len(os.listdir("/proc/self/fd"))

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    for _ in range(3):
        with pytest.raises(UnreachableError):
            shards.read(0, np.arange(2))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_that_goes_missing_is_damage(folder, tmp_path, waits):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shards = LatentShards(copy)
    (copy / "train-000000.tar").unlink()
    with pytest.raises(CorruptShardError, match="is corrupt: no such file"):
        shards.read(0, np.arange(2))
    (copy / "train-000001.index.json").unlink()
    with pytest.raises(CorruptShardError, match="Cannot read the "):
        LatentShards(copy)
    assert not waits


def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    remote = LatentShards(str(folder))
    remote.location = Location(f"pipe:cat {folder}/train-{{000000..000001}}.tar", str(tmp_path / "file"))
    stream = batches(remote, DataConfig("", batch_size=2, workers=0))
    with pytest.raises(OSError, match="File exists"):
        next(stream)


def test_patience_is_for_what_may_pass():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry(interrupted, "x")
    assert retry(lambda: 3, "x") == 3
