"""What a part of the acceptance program has found: JSON beside a table, written after every check; resumable."""

import json
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvdm.files import write_text

DONE = ("passed", "measured", "left out")  # a check in one of these states is not repeated


class LeftOutError(Exception):
    """A check that this machine cannot run; the message is the reason."""


@dataclass(frozen=True)
class Outcome:
    """What a check has found.

    Attributes:
        values: numbers and words by name.
        good: whether they are within their limits; None where there is no limit.
        limits: the limits, for the table.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    good: bool | None = None
    limits: str = ""


class Record:
    """The checks of one part.

    Args:
        part: name of the part.
        settings: of the program; results of other settings are discarded.
        device: cuda or cpu.
        out: folder for `PART.json` and `PART.md`.
    """

    def __init__(self, part: str, settings: Mapping[str, Any], device: str, out: Path) -> None:
        self.part, self.device, self.out = part, device, out
        self.checks: dict[str, dict[str, Any]] = {}
        self.header: dict[str, Any] = {"part": part, "settings": dict(settings), "machine": describe_machine(device)}
        out.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            before = json.loads(self.file.read_text())
            if before["settings"] == json.loads(json.dumps(self.header["settings"])):
                self.checks = before["checks"]

    @property
    def file(self) -> Path:
        """The JSON file; the table stands beside it."""
        return self.out / f"{self.part}.json"

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, check in self.checks.items() if check["state"] not in DONE]

    def check(self, name: str, function: Callable[[], Outcome]) -> None:
        """Run a check unless an earlier start has finished it, and write its result at once."""
        if self.checks.get(name, {}).get("state") in DONE:
            print(f"{self.part}: {name}: {self.checks[name]['state']} by an earlier start", flush=True)
            return
        start = time.monotonic()
        found = run(function)
        self.checks[name] = found | {"seconds": round(time.monotonic() - start, 2)}
        self.write()
        print(f"{self.part}: {name}: {summary(found)}", flush=True)

    def write(self) -> None:
        """Write the JSON and the table."""
        write_text(self.file, json.dumps(self.header | {"checks": self.checks}, indent=1) + "\n")
        write_text(self.file.with_suffix(".md"), table(self.header, self.checks))


def run(function: Callable[[], Outcome]) -> dict[str, Any]:
    """The result of a check as JSON holds it; an error is a result too, so that the next check has its turn."""
    try:
        outcome = function()
    except LeftOutError as reason:
        return {"state": "left out", "values": {}, "limits": "", "reason": str(reason)}
    except Exception as error:  # Whatever a driver or a library raises: the other checks must still run.
        sentence = (str(error).strip().splitlines() or ["-"])[0]
        found = {"state": "failed", "values": {}, "limits": "", "reason": f"{type(error).__name__}: {sentence}"}
        return found | {"traceback": traceback.format_exc()}
    states = {None: "measured", True: "passed", False: "failed"}
    return {"state": states[outcome.good], "values": dict(outcome.values), "limits": outcome.limits}


def summary(check: Mapping[str, Any]) -> str:
    """One line of a check for a terminal."""
    values = ", ".join(f"{key} {shown(value)}" for key, value in check["values"].items())
    return " ".join(filter(None, (f"{check['state']}:", values, check.get("reason", ""))))


def shown(value: Any) -> str:
    """A value for people: four digits of a number."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)


def table(header: Mapping[str, Any], checks: Mapping[str, Mapping[str, Any]]) -> str:
    """The checks of a part as Markdown."""
    lines = [f"# {header['part']}", ""]
    lines += [f"- {key}: {value}" for key, value in header["machine"].items()]
    lines += ["", "| check | result | limit | state | seconds |", "|---|---|---|---|---|"]
    for name, check in checks.items():
        values = "; ".join(f"{key} {shown(value)}" for key, value in check["values"].items())
        result = "; ".join(filter(None, (values, check.get("reason", "")))) or "-"
        cells = (name, result, check["limits"] or "-", check["state"], f"{check['seconds']:.1f}")
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def describe_machine(device: str) -> dict[str, str]:
    """What the results depend on: the device, its driver, and the versions of the libraries."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found["device"] = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"
        found["CUDA"] = str(torch.version.cuda)
    for package in ("deepspeed", "triton", "flash-attn", "flash-attn-4", "mlflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"python": platform.python_version()}
