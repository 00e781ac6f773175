"""A download from the hub is not silent in a log."""

import time

from fvdm import hub
from tests.runs import wait_until


def test_a_log_says_how_far_a_download_is_and_nothing_where_nothing_comes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "LOG_EVERY", 0.05)
    blobs = tmp_path / "models--lab--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "old").write_bytes(bytes(100))
    said = ""
    with hub.fetching("lab/model/vae"), (blobs / "new.incomplete").open("wb") as file:

        def grows():
            nonlocal said
            file.write(bytes(20_000_000))
            file.flush()
            said += capfd.readouterr().err
            return said.count("fetching lab/model/vae: ") > 1

        wait_until(grows)
    assert "GB so far" in said
    capfd.readouterr()
    for name in ("lab/model", "builtin", str(tmp_path)):
        with hub.fetching(name):
            time.sleep(0.2)  # Some looks; there is nothing to wait for.
    assert capfd.readouterr().err == ""
