"""Races of an operation with implementations of every fault; a program in place of `kernel_races.worker`."""

from __future__ import annotations

import os
import signal
import time
from unittest import mock

import torch

from ppcl_rt.ops.implementation import CUDNN, FLASH, TORCH, Implementation, Key

FAST, GARBAGE, LATE, DIES = (Implementation("triton", (number,)) for number in range(4))


class Faulty:
    """An operation whose implementations have every kind of fault."""

    name = "faulty"

    def __init__(self):
        self.calls = 0

    def checked(self, call):
        return call

    def key(self, call):
        return Key(f"faulty {call}", (1, 2))

    def implementations(self, call):
        return [FAST, GARBAGE, LATE, DIES, CUDNN, FLASH, TORCH] if call else [FAST, TORCH]

    def run(self, call, implementation):
        y = torch.ones(1, 128, 128)
        self.calls += implementation == LATE
        if implementation == GARBAGE or (implementation == LATE and self.calls > 2):
            y[0, 64:, 64:] = 0
        elif implementation == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        elif implementation == CUDNN:
            time.sleep(60)
        elif implementation == FLASH:
            raise RuntimeError("no kernel\nhere")
        elif implementation == TORCH:
            time.sleep(0.01)
        return y


def _cases(setting):
    """Two cases; the block itself dies at a quarter of the width."""
    if setting.width == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return iter([race.Case("first", FAULTY, 0), race.Case("second", FAULTY, 1)])


if __name__ == "__main__":
    from kernel_races import presets, race, worker

    FAULTY = Faulty()
    made = [presets.Setting(96, 9, 3, 1, width) for width in (25, 100)]
    with (
        mock.patch.object(race, "Block", lambda preset: mock.Mock(cases=_cases)),
        mock.patch.object(race, "settings", lambda preset: made),
        mock.patch.object(race, "work_of", lambda case, results: (10**6, 10**6)),
    ):
        worker.main()
