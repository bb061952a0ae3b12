"""A whole training run of a few seconds: 4 blocks, 2 heads."""

from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes

ARCHITECTURE = {**PRESETS["scenes"].teacher.architecture, "num_layers": 4, "num_attention_heads": 2}
TINY = with_changes(
    PRESETS["scenes"],
    {
        "teacher.architecture": ARCHITECTURE,
        "teacher.phases": [{"until": 6, "horizon": 12}, {"until": 12, "horizon": 12, "shares": [0, 0, 0.5, 0.5, 0]}],
        "teacher.batch": 4,
        "teacher.compile": False,
        "probes.samples": 48,
        "probes.cka_samples": 16,
        "table.lengths": [2, 3],
        "table.steps": 4,
        "table.trial_steps": 2,
        "table.batches": 2,
        "table.batch": 4,
        "table.samples": 8,
        "students.steps": 8,
        "students.batch": 4,
        "recover.steps": 6,
        "recover.batch": 4,
        "recover.spacing": 0.2,
        "refine.steps": 4,
        "refine.batch": 4,
        "refine.spacing": 0.25,
        "refine.other_spacing": 0.5,
        "width.ranks": [5, 2],
        "width.heads": [0.5],
        "width.channels": [0.5],
        "width.samples": 48,
        "measure.samples": 8,
        "measure.spacing": 0.25,
        "measure.other_spacing": 0.5,
        "batch": 16,
        "save_every": 2,
        # Tests look at what each stage left.
        "keep_all": True,
    },
)
