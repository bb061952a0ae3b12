"""Train a toy model of four blocks and make it pluggable: all stages of `ppcl train`, with few steps each.

python examples/compress_a_toy_model.py [FOLDER]

It draws badly: the shipped checkpoint has 12 blocks, and its teacher was trained for 24,000 steps. With a FOLDER, a
run that was stopped goes on.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

import ppcl_rt
from ppcl_rt.pipelines.likeness import likeness_of
from ppcl_rt.pipelines.task import task_of
from ppcl_train.cli import config_of
from ppcl_train.pipeline import begin, run_stages

# As `--set` of `ppcl train run --preset scenes` takes them.
CHANGES = """
teacher.architecture.num_layers=4 teacher.architecture.num_attention_heads=2 teacher.compile=false
teacher.phases=[{"until":400,"horizon":400}] teacher.batch=32 probes.samples=48 probes.cka_samples=16
width.heads=[0.5] width.channels=[0.5,0.25] width.ranks=[8,2] width.samples=64
table.steps=10 table.trial_steps=5 table.batches=2 table.batch=8 table.samples=16 students.steps=40
recover.steps=40 recover.spacing=0.2 refine.steps=40 refine.spacing=0.25 refine.other_spacing=0.5
measure.samples=16 measure.spacing=0.25 measure.other_spacing=0.5
"""
RATIOS = (1.0, 0.7, 0.5)


def main() -> None:
    """Print what the toy costs at three ratios, and how near its pictures stay to its teacher's."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="ppcl-toy-"))
    settings, begun = config_of("scenes", CHANGES.split()), time.perf_counter()
    begin(settings, out)
    run_stages(settings, out)
    model = ppcl_rt.load(out / "checkpoint", dtype=torch.float32)
    print(f"made {out / 'checkpoint'} in {time.perf_counter() - begun:.0f} s")
    task, prompts = task_of(model.catalog), ["two red squares", "a red square at b2"]
    dense = task.sample(model, prompts, seed=0)
    for ratio in RATIOS:
        with model.at(ratio=ratio):
            costs, ssim = model.costs(), likeness_of(dense, task.sample(model, prompts, seed=0))["ssim"]
        print(f"ratio {costs['ratio']:.3f}: {costs['params']:,} parameters, SSIM {ssim:.3f} to ratio 1")


if __name__ == "__main__":
    main()
