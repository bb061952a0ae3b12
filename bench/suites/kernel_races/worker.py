"""The races of `bench_kernels`, in a program of their own: a fault of the device ends a process.

`bench_kernels` starts it anew, and does not fork: what is imported here asks CUDA for its devices, and a process that
has used CUDA leaves its forks without it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

if "tiny" in sys.argv:
    # Triton reads this when a kernel is defined, which the imports below do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from kernel_races.presets import PRESETS
from kernel_races.race import Races


def main() -> None:
    """Race the cases that are left, and append to a file, as JSON lines, how that ended."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("out", type=Path, help="folder of choose.json")
    parser.add_argument("deadline", type=float, help="a value of time.monotonic, which all processes share")
    parser.add_argument("stall", type=int, help="seconds that one contestant may take")
    parser.add_argument("lines", type=Path, help="the file to append to")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if preset.device == "cuda" and not torch.cuda.is_available():
        said = {"no_device": True}
    else:
        with torch.no_grad():
            said = {"complete": Races(preset, options.out, options.deadline, options.stall).run()}
    with options.lines.open("a") as file:
        print(json.dumps(said), file=file)


if __name__ == "__main__":
    main()
