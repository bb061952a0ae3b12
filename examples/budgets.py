"""Ask for parameters, FLOPs, memory or a device to fit into, in the place of a ratio.

python examples/budgets.py
"""

from pathlib import Path

import torch

import ppcl_rt

SCENES = Path(__file__).parent / "scenes"
BUDGETS = (
    {"params": "1M"},
    {"flops": "20M"},
    {"memory": "6MB"},
    {"fit": "8MB"},
    {"params": "2M", "flops": "30M", "shape": "16+7"},
)


def main() -> None:
    """Print what each budget grants, and how one that cannot be met is refused."""
    model = ppcl_rt.load(SCENES, memory="6MB", dtype=torch.float32)
    print(f"loaded into 6 MB: {model.resident_bytes / 1e6:.2f} MB are held")
    for budget in BUDGETS:
        model.set_budget(**budget)
        costs = model.costs()
        asked = ", ".join(f"{name} {value}" for name, value in budget.items())
        print(
            f"{asked}: ratio {costs['ratio']:.3f}, {costs['params'] / 1e6:.2f} M parameters, "
            f"{costs['flops'] / 1e6:.1f} MFLOPs, {costs['memory'] / 1e6:.2f} MB"
        )
    try:
        model.set_budget(memory="100KB")
    except ValueError as refused:
        print(f"memory 100KB: {refused}")


if __name__ == "__main__":
    main()
