"""The use of CPU, memory, disk, network and GPUs, sampled by mlflow's monitors into the journal.

mlflow's own thread reports to the server directly, and ends for good at the first request that fails.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from fvdm.tracking.server import prepare

INTERVAL = 10.0  # seconds between two points, as mlflow's


class SystemMetrics:
    """A thread that samples until `stop`."""

    def __init__(self, report: Callable[[dict[str, float]], None]) -> None:
        """Begin; `report` gets the values by name, such as `system/cpu_utilization_percentage`."""
        self._report = report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        prepare()
        monitors = _monitors()
        interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", INTERVAL))
        while not self._stop.wait(interval):
            values: dict[str, float] = {}
            for monitor in monitors:
                with contextlib.suppress(Exception):  # A sensor that fails ends no training run.
                    monitor.collect_metrics()
                    values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            self._report(values)

    def stop(self) -> None:
        """End the thread; nothing is reported afterwards."""
        self._stop.set()
        self._thread.join()


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # There is no GPU, or nothing to ask it with.
        monitors.append(GPUMonitor())
    return monitors
