"""The loss of many choices together: |sum of their changes|^2, of which a sum of losses knows the squares alone.

With D_i the change of the prediction that choice i makes alone, choices that are taken together change it by about
sum D_i. A random sketch of each D_i (`ppcl_rt.planning.sketch`) keeps all inner products of them roughly. No torch.
"""

from __future__ import annotations

import numpy as np

from ppcl_rt.planning.choices import Choices

# Swaps of two choices at once are sought among so many that save and so many that spend.
_PAIRS = 256
# Improvements of one plan; each takes milliseconds.
_ROUNDS = 64


class Interactions:
    """Predicts losses from sketches of changes, and improves plans by them.

    Args:
        choices: of a catalog.
        rows: sketches of the change that each choice makes, ``[choices, size]``; full counts change nothing.
    """

    def __init__(self, choices: Choices, rows: np.ndarray) -> None:
        self._choices = choices
        self.rows = rows.astype(np.float32)
        self._squares = np.einsum("ns,ns->n", rows, rows)
        # Inner products within a group, ``[choices, counts]``: the other count goes by its place in the group.
        self._places, self._inner = choices.places, np.zeros((len(rows), choices.places.max() + 1))
        for numbers in choices.groups:
            self._inner[np.ix_(numbers, range(len(numbers)))] = self.rows[numbers] @ self.rows[numbers].T

    def loss(self, taken: np.ndarray) -> float:
        """The predicted loss of a set of choices."""
        return float(np.square(self.rows[taken].sum(0, dtype=np.float64)).sum())

    def marginal(self, taken: np.ndarray) -> np.ndarray:
        """What each choice would add to the loss of a set if it took the place of those that it excludes.

        The objective of a linear program near the set: the quadratic form, linear around it.
        """
        together = self.rows @ self.rows[taken].T
        together[self._choices.excluded(taken)] = 0
        return self._squares + 2 * together.sum(1, dtype=np.float64)

    def improve(self, taken: np.ndarray, costs: np.ndarray, room: np.ndarray) -> np.ndarray:
        """Exchange one count, or two counts of two groups at once, as long as that lowers the loss within the budgets.

        Args:
            taken: a set of choices.
            costs: of each choice in each currency, ``[currencies, choices]``.
            room: in each currency, ``[currencies]``.
        """
        for _ in range(_ROUNDS):
            moves = self._choices.moves(taken)
            if not len(moves):
                break
            before, after = moves.T
            along = self.rows @ self.rows[taken].sum(0)
            gain = self._squares[after] + self._squares[before] - 2 * self._inner[before, self._places[after]]
            gain += 2.0 * (along[after] - along[before])
            spend, left = costs[:, after] - costs[:, before], room - costs[:, taken].sum(1)
            best = self._best(moves, gain, spend, left)
            if best is None:
                break
            taken = np.setdiff1d(np.union1d(taken, after[best]), before[best])
        return taken

    def _best(self, moves: np.ndarray, gain: np.ndarray, spend: np.ndarray, left: np.ndarray) -> np.ndarray | None:
        """The move or pair of moves that lowers the loss most; None where none does."""
        # Sketches are kept in float32: what does not lower the loss by more than its rounding is no gain.
        least = -1e-5 * max(float(np.abs(gain).max()), 1e-30)
        scale = np.maximum(np.abs(spend).max(1, keepdims=True), 1e-30)
        fits = (spend <= left[:, None]).all(0)
        single = np.where(fits, gain, 0.0)
        found, lowest = None, least
        if single.min() < lowest:
            found, lowest = np.array([single.argmin()]), float(single.min())
        # A pair: one that lowers the loss, and one that makes room for it (or that it makes room for).
        weight = (spend / scale).max(0)
        lower = np.argsort(gain, kind="stable")[:_PAIRS]
        rate = np.where(weight < 0, gain / np.minimum(weight, -1e-12), -np.inf)
        saving = np.argsort(-rate, kind="stable")[:_PAIRS]
        change, other = (self.rows[after] - self.rows[before] for before, after in (moves[lower].T, moves[saving].T))
        pairs = gain[lower][:, None] + gain[saving][None] + 2 * change @ other.T
        both = (spend[:, lower][:, :, None] + spend[:, saving][:, None] <= left[:, None, None]).all(0)
        allowed = both & (moves[lower, 0][:, None] != moves[saving, 0][None])
        pairs = np.where(allowed, pairs, 0.0)
        if pairs.min() < lowest:
            i, j = np.unravel_index(pairs.argmin(), pairs.shape)
            found = np.array([lower[i], saving[j]])
        return found
