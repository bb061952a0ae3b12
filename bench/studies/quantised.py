"""What weights in eight bits cost on scenes: score at each ratio next to that in float32, and bytes held.

    python bench/studies/quantised.py --prompts 500 --seed 1 --json quantised.json

Prints, for every ratio and format, the strict and soft score, what is lost of that in float32 at the ratio, and bytes
held. All formats see the same prompts and the same noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import ppcl_rt
from ppcl_rt import Quantisation
from ppcl_rt.pipelines.task import task_of

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "scenes"
FORMATS: dict[str, Quantisation | None] = {
    "float32": None,
    "int8": Quantisation(format="int8"),
    "float8": Quantisation(format="float8"),
    "float8-dynamic": Quantisation(format="float8-dynamic"),
    "int8, nothing kept": Quantisation(format="int8", keep=()),
    "float8, nothing kept": Quantisation(format="float8", keep=()),
}


def main() -> None:
    """Measure, print a table, and write the rows if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", default="1,0.7,0.5,0.35")
    parser.add_argument("--formats", default="int8;float8", help=f"of {'; '.join(FORMATS)}")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        "| ratio | weights | strict | soft | strict lost | bytes | of float32 |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for ratio in map(float, given.ratios.split(",")):
        dense: dict[str, Any] = {}
        for name in ("float32", *given.formats.split(";")):
            model = ppcl_rt.load(CHECKPOINT, ratio, quantize=FORMATS[name], dtype=torch.float32)
            scores = task_of(model.catalog).judge(model, given.prompts, given.seed)
            row = {"ratio": ratio, "weights": name, "bytes": model.resident_bytes, "planned": model.costs()["memory"]}
            row |= {key: scores[key] for key in ("strict", "strict_ci", "soft")}
            dense = dense or row
            row["strict_lost"] = 1 - row["strict"] / dense["strict"]
            rows.append(row)
            lost, share = f"{100 * row['strict_lost']:.2f} %", row["bytes"] / dense["bytes"]
            cells = (f"{ratio:g}", name, f"{row['strict']:.3f}", f"{row['soft']:.4f}", lost, f"{row['bytes']:,}")
            print(f"| {' | '.join(cells)} | {share:.2f} |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps({"prompts": given.prompts, "seed": given.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
