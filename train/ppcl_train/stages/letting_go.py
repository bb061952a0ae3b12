"""What stages leave that nobody reads any more is deleted as soon as that is so: the disk would hold it all twice."""

from __future__ import annotations

import shutil
from pathlib import Path

# By stage: earlier stages whose outputs are of no use any more when it is done. What refinement leaves stays: it is all
# that a checkpoint is packed from, in float32.
LETS_GO: dict[str, tuple[str, ...]] = {
    "compress": ("students",),
    "recover": ("width", "compress"),
    "refine": ("recover",),
}


def let_go(output: Path) -> None:
    """Delete a file, or a list of parts (`ppcl_train.engine.parts`) and then the parts."""
    # The list first: whatever kills the process, no list names files that are gone.
    output.unlink(missing_ok=True)
    if output.suffix == ".json":
        shutil.rmtree(output.with_suffix(""), ignore_errors=True)
