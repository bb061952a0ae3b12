"""What a measuring process leaves for the process that started it, and the faults that tests put into it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppcl_kernels.tools.machine import write_json


@dataclass
class Report:
    """What a process has measured so far.

    Its parent reads the file while the process runs; a process that continues the work reads it first.
    """

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, self.content)

    def running(self, name: str) -> None:
        """Note what runs from now on, so that it can be named if this process dies."""
        self.path.with_suffix(".running").write_text(name)


class InjectedFaults:
    """Faults that tests put in: name of a contestant or row -> ``raise``, ``kill`` or ``hang``."""

    def __init__(self, faults: dict[str, str]) -> None:
        self.faults = faults

    def meet(self, name: str) -> None:
        """Suffer the fault that was put in for a name, if there is one."""
        how = self.faults.get(name)
        if how == "raise":
            raise RuntimeError("a fault that was put in")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while how == "hang":
            time.sleep(1)


def failure(why: str) -> dict[str, Any]:
    """Return the fields of a row that failed; times that were taken before are void."""
    return {"failed": why, "ms": None, "host_ms": None, "device_ms": None}
