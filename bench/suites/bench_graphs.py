"""What a replayed forward costs the host: 60 small Qwen-Image blocks, and a graph that does nothing, without a device.

    python bench/suites/bench_graphs.py [--json]

Prints microseconds of the thread's own CPU time (median of 300), or with ``--json`` a list of ``{"operation", "us"}``.
``check`` compares modules and weights with those of the capture. ``conditions`` makes the model's part of the key of a
graph. ``forward`` is a whole replayed call of the model, and includes the other two.
"""

import argparse
import contextlib
import json
import statistics
import time

import torch

import ppcl_rt
from ppcl_rt.model.graphs import Graphs, Weights

CONFIG = {
    "num_layers": 60,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 16,
    "out_channels": 4,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


class Nothing:
    """Takes the place of CUDA: captures by running the call, replays by doing nothing."""

    outputs = None

    def supports(self, device):
        return True

    def capturing(self):
        return False

    def warm(self, device, call):
        self.outputs = call()

    def capture(self, device, call):
        return self

    def exclusive_memory(self, device):
        return contextlib.nullcontext()

    def replay(self):
        pass

    def close(self):
        pass


def microseconds(call, repeats=300):
    times = []
    for _ in range(repeats + 3):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return round(statistics.median(times[3:]) * 1e6)


def measure():
    torch.manual_seed(0)
    model = ppcl_rt.PPCLQwenImageTransformer2DModel(**CONFIG).eval().requires_grad_(False)
    model._graphs = Graphs(True, backend=Nothing())
    inputs = {
        "hidden_states": torch.randn(1, 64, 16),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.rand(1),
        "img_shapes": [[(1, 8, 8)]],
    }
    program = model._program()
    weights = Weights(model, model._reads(program))
    with torch.no_grad():
        for _ in range(2):
            model(**inputs)
        assert model.graphs.captures == 1, model.graphs.eager_reason
        calls = {
            "check": weights.unchanged,
            "conditions": lambda: model._graph_settings(program),
            "forward": lambda: model(**inputs),
        }
        return [{"operation": name, "us": microseconds(call)} for name, call in calls.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    results = measure()
    if parser.parse_args().json:
        print(json.dumps(results, indent=1))
    else:
        for each in results:
            print(f"{each['operation']:12}{each['us']:8} us")


if __name__ == "__main__":
    main()
