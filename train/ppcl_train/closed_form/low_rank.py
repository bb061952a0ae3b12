"""Low rank: linear layers that share their inputs, replaced by the product of two thin layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Weight and bias of a linear layer.
Affine = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def factor(layers: Sequence[nn.Linear], inputs: torch.Tensor, rank: int) -> tuple[Affine, Affine]:
    """Find the two layers whose product is nearest to ``layers`` on ``inputs``, at every rank up to ``rank`` at once.

    ``W`` stands for the weights of all layers below one another, ``C`` for the covariance of the inputs. The best map
    of rank r is ``U U^T W`` with the first r left singular vectors ``U`` of ``W C^(1/2)`` (Eckart & Young 1936).
    These vectors do not depend on r, so a lower rank is a prefix of a higher one.

    Args:
        layers: linear layers that read the same inputs.
        inputs: ``[n, D]``.
        rank: the highest rank.

    Returns:
        Weight and bias of the first layer (``[rank, D]``), and of the second (``[outputs of all layers, rank]``).
    """
    weight = torch.cat([layer.weight for layer in layers]).double()
    bias = torch.cat([layer.bias for layer in layers]).double()
    x = inputs.double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    root = vectors * values.clip(min=0).sqrt()
    left = torch.linalg.svd(weight @ root, full_matrices=False).U[:, :rank]
    down = left.T @ weight
    return (down, -(down @ mean)), (left.contiguous(), bias + weight @ mean)
