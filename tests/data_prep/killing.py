"""Encodings that are killed -9 at random moments of their work, one after another."""

import os
import subprocess
import sys

# The processes are forked from one that has the imports behind it: kills fall on the work, and a start costs little.
PROGRAM = """
import os, random, signal, sys, time
from pathlib import Path

import av, diffusers, torch, transformers, webdataset, pyarrow
import data_prep.encoding, fvdm.media.text, fvdm.media.vae
from diffusers import AutoencoderKL, AutoencoderKLWan
from transformers import AutoConfig, AutoTokenizer, UMT5EncoderModel
from data_prep.config import EncodeConfig, resolve
from data_prep.decoding import Restarted, decode
from data_prep.encode_latents import run
from data_prep.encoder import open_models
from data_prep.encoding import encode_shards
from data_prep.planning import make_plan
from data_prep.shards import Work
from fvdm.config import parse

out, good, kills, words = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
draw = random.Random(0)
while kills:
    before = len(list(out.rglob("*")))
    pid = os.fork()
    if not pid:
        os.setsid()
        os._exit(run(words))
    some = before + draw.randrange(1, 6)  # files: not every process comes as far
    while len(list(out.rglob("*"))) < some and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    kills -= os.WIFSIGNALED(status)
    print(kills, sorted(path.name for path in out.glob("*.tar")), flush=True)
    assert os.WIFSIGNALED(status), "it came to its end before it was killed"
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (good / path.name).read_bytes(), f"{path.name} is not complete"
"""


def kill_encodings(words, out, good, kills):
    """Start the same encoding again and again, and kill it; after each kill, every shard is complete.

    Args:
        words: the settings.
        out: the folder that they name.
        good: what the settings give undisturbed.
        kills: number of kills.
    """
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PROGRAM, str(out), str(good), str(kills), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
