"""How much host memory `load` takes, over what it keeps.

    python bench/studies/host_memory.py [--blocks 60] [--heads 4]

A random Qwen-Image model with so many blocks of ``heads`` heads of 64 is written in float32, and loaded in a process of
its own for each dtype and format. *Peak* is the growth of anonymous memory (``RssAnon``: files that are mapped do not
count) from before `load`, looked at every half millisecond; *kept* are the bytes that the model holds afterwards.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import ppcl_rt

CASES = (("float32", None), ("bfloat16", None), ("bfloat16", "int8"))


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def measure(folder: str, small: str, dtype: str, quantize: str | None) -> None:
    """Print what loading a folder takes; ``small`` is loaded before, so that all code is imported."""
    settings = {"dtype": getattr(torch, dtype), "quantize": quantize}
    ppcl_rt.load(small, **settings)
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = ppcl_rt.load(folder, **settings)
    done.set()
    watcher.join()
    kept = model.resident_bytes
    said = f"{dtype}, {quantize or 'as read'}: kept {kept / 1e6:.0f} MB, peak {(peak - before) / 1e6:.0f} MB"
    print(f"{said}, {(peak - before) / kept:.2f} of it", flush=True)


def write(folder: Path, blocks: int, heads: int) -> None:
    """Write a random model in float32."""
    torch.manual_seed(0)
    ppcl_rt.PPCLQwenImageTransformer2DModel(
        num_layers=blocks,
        num_attention_heads=heads,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=64,
    ).save_pretrained(folder)


def main() -> None:
    """Write two models, and measure each case in a process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--of", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.of:
        measure(*asked.of[:3], asked.of[3] or None)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "large", asked.blocks, asked.heads)
        write(Path(folder) / "small", 2, 1)
        for dtype, quantize in CASES:
            of = [f"{folder}/large", f"{folder}/small", dtype, quantize or ""]
            subprocess.run([sys.executable, __file__, "--of", *of], check=True)


if __name__ == "__main__":
    main()
