"""Agreement of two results, tile by tile: what passes as a rounding, and what does not."""

import pytest
import torch

from ppcl_rt.ops.agreement import agree


@pytest.mark.parametrize("fault", ["garbage", "zero", "nan", "scaled"])
@pytest.mark.parametrize("shape", [(2, 200, 320), (1, 130, 3, 50), (90, 70)])
def test_agree_judges_every_tile(shape, fault):
    """One wrong 32 x 32 corner among many tiles is refused; roundings of bfloat16 are accepted."""
    torch.manual_seed(0)
    wanted = torch.randn(shape)
    assert agree(wanted.bfloat16(), wanted)
    broken = wanted.clone()
    rows = broken.flatten(2)[-1] if broken.dim() > 2 else broken
    corner = rows[-32:, -32:]
    corner.copy_(
        {"garbage": torch.randn(32, 32), "zero": torch.zeros(32, 32), "nan": corner / 0 * 0, "scaled": corner * 1.5}[
            fault
        ]
    )
    assert not agree(broken, wanted)
    assert not agree([wanted, broken], [wanted, wanted])


def test_agree_minds_quiet_tiles():
    """If a few channels are a hundred times the others, as in large transformers, the others are judged too."""
    torch.manual_seed(0)
    wanted = torch.randn(1, 256, 512)
    wanted[..., :3] *= 100
    broken = wanted.clone()
    broken[:, 64:128, 128:192] = 0
    assert agree(wanted.bfloat16(), wanted) and not agree(broken, wanted)
    # A tile whose own values cancel out has the rounding errors of its neighbours.
    quiet = wanted.clone()
    quiet[:, 64:128, 128:192] *= 1e-3
    assert agree(quiet + 1e-3 * torch.randn(quiet.shape), quiet)
