"""The matching loss of students: the streams after a student against the teacher's (PPCL eq. 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ppcl_rt import Streams
from ppcl_train.engine.distributed import ALONE, World


def token_rows(streams: Streams, mask: torch.Tensor) -> Streams:
    """Flatten both streams to rows ``[n, D]``: every image token, and those text tokens that are words.

    Args:
        streams: ``[N, S, D]`` each.
        mask: ``[N, S_text]``, true on words.
    """
    return Streams(image=streams.image.flatten(0, 1), text=streams.text[mask])


def matching_loss(
    student: Streams, teacher: Streams, mask: torch.Tensor, magnitude: float, world: World = ALONE
) -> torch.Tensor:
    """Compute ``|| n(student) - n(teacher) ||^2`` a token, summed over both streams (PPCL eq. 6).

    n is L2 normalisation over features. Eq. 6 sees direction alone and leaves the length of the residual stream free.

    Args:
        student: streams that the student put out, ``[N, S, D]`` each.
        teacher: streams of the teacher after the student's interval.
        mask: ``[N, S_text]``, true on words.
        magnitude: weight of the added term, the squared error over the teacher's mean square; 0 for eq. 6 alone.
        world: the processes that share a batch. The mean of their losses is the loss of the whole batch.
    """
    total = torch.zeros((), device=mask.device)
    for mine, theirs in zip(token_rows(student, mask), token_rows(teacher, mask), strict=True):
        mine, theirs = mine.float(), theirs.float()
        count, square = world.mean(
            torch.stack([mask.new_tensor(len(theirs), dtype=torch.float), theirs.square().sum()])
        )
        total = total + (F.normalize(mine, dim=-1) - F.normalize(theirs, dim=-1)).square().sum() / count
        if magnitude:
            total = total + magnitude * (mine - theirs).square().sum() / square
    return total
