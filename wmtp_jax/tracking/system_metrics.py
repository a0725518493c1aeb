"""What the machine does during a run: processor, memory, disk, network and NVIDIA GPUs, in `system.jsonl` and so in MLflow.

The monitors and the names are MLflow's own (`system/cpu_utilization_percentage`, ...), for its page of system metrics.
They are read by the process that feeds MLflow (`tracking.py`), never by the training, and written to a file first: what a server
that is down misses is replayed with everything else.
"""

from __future__ import annotations

import time
from pathlib import Path

from wmtp_jax.tracking.metrics_file import MetricsFile, read_metrics

SYSTEM_FILE = "system.jsonl"


class SystemMetrics:
    """Samples of the machine, one line each `seconds`; `step` counts lines and goes on where a resumed run stopped.

    Args:
        run: the run directory.
        seconds: between two samples.
    """

    def __init__(self, run: Path, seconds: float):
        # Late: importing mlflow takes seconds, and only the process that feeds MLflow may take them.
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._file = MetricsFile(run / SYSTEM_FILE)
        lines = read_metrics(run / SYSTEM_FILE)
        self._step = lines[-1]["step"] + 1 if lines else 0
        self._first = self._step
        self._seconds = seconds
        self._next = time.monotonic() + min(seconds, 1.0)  # the processor's use is counted from one sample to the next
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self._monitors.append(GPUMonitor())
        except (ImportError, RuntimeError):  # no NVIDIA driver here, or not the package that asks it
            pass
        for monitor in self._monitors:
            monitor.collect_metrics()
            monitor.clear_metrics()

    def sample(self, *, last: bool = False) -> None:
        """Writes a line if it is time for one, or if it is the last chance and there is none yet: a run may be over soon.

        Raises:
            UserError: the file can't be written.
        """
        if self._step > self._first if last else time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._seconds
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        self._file.write(self._step, "system", {f"system/{name}": value for name, value in values.items()})
        self._step += 1
