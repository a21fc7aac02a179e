"""Byte n-gram model with interpolated modified Kneser-Ney smoothing: the baseline that the demo must beat.

The formulas are those of Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998),
section 4.1.6: every order subtracts a discount that depends on the count (1, 2, or more), gives what it took to the
next lower order, and the lower orders count in how many contexts a symbol was seen instead of how often. The lowest
order falls back to the uniform distribution.

Symbols are the 256 bytes and one boundary. A document is preceded by n - 1 boundaries and ended by one, so that its
end is predicted like every other symbol. An n-gram is one integer: its symbols as digits in base 257.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BOUNDARY = 256
NUM_SYMBOLS = 257

Array = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def ngrams(documents: list[bytes], order: int) -> Array:
    """The n-gram that ends at each byte and at each document's end, int64 [bytes + documents]."""
    padding = np.full(order - 1, BOUNDARY)
    pieces = [np.concatenate([padding, np.frombuffer(text, np.uint8), [BOUNDARY]]) for text in documents]
    grams = [np.zeros(len(piece) - order + 1, np.int64) for piece in pieces]
    for gram, piece in zip(grams, pieces, strict=True):
        for i in range(order):
            gram *= NUM_SYMBOLS
            gram += piece[i : i + len(gram)]
    return np.concatenate(grams)


def discounts(counts: Array) -> Floats:
    """What is subtracted from a count of 0, 1, 2 and of 3 or more, estimated from how many n-grams have 1 to 4."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in range(1, 5))
    if 0 not in (n1, n2, n3):
        y = n1 / (n1 + 2 * n2)
        estimates = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (estimates[1:] > 0).all():  # else a context could leave nothing to what it has not seen
            return estimates
    return np.array([0, 0.5, 1, 1.5])  # too little text for the estimate


def lookup(keys: Array, values: npt.NDArray, queries: Array) -> npt.NDArray:
    """The value of each query's key among the sorted keys, 0 where it is not among them."""
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], 0)


@dataclass(frozen=True)
class Level:
    """The n-grams of one order, sorted, and the contexts they share."""

    grams: Array
    kept: Floats  # count less discount of each n-gram
    contexts: Array
    totals: Array  # count of each context
    freed: Floats  # sum of the discounts in each context

    @classmethod
    def from_counts(cls, grams: Array, counts: Array) -> Level:
        discount = discounts(counts)[np.minimum(counts, 3)]
        contexts, inverse = np.unique(grams // NUM_SYMBOLS, return_inverse=True)
        totals = np.bincount(inverse, counts).astype(np.int64)
        return cls(grams, counts - discount, contexts, totals, np.bincount(inverse, discount))


class KneserNey:
    """Probability of the next byte or end of document given the order - 1 symbols before it."""

    def __init__(self, documents: list[bytes], order: int = 4):
        """Counts the n-grams of the documents.

        Raises: ValueError when the order is not in 1..7 (an n-gram must fit 64 bits) or there is no document.
        """
        if not 1 <= order <= 7:
            raise ValueError(f"order is {order}: an n-gram of 1 to 7 symbols fits 64 bits")
        if not documents:
            raise ValueError("documents is empty: there is nothing to count")
        self.order = order
        grams, counts = np.unique(ngrams(documents, order), return_counts=True)
        self.levels = [Level.from_counts(grams, counts)]  # highest order first
        for length in range(order - 1, 0, -1):
            grams, counts = np.unique(grams % NUM_SYMBOLS**length, return_counts=True)
            self.levels.append(Level.from_counts(grams, counts))

    def probabilities(self, grams: Array) -> Floats:
        """Probability of each n-gram's last symbol given the others, float64 of the shape of `grams`."""
        probability = np.full(grams.shape, 1 / NUM_SYMBOLS)
        for length, level in enumerate(reversed(self.levels), start=1):
            query = grams % NUM_SYMBOLS**length
            context = query // NUM_SYMBOLS
            total = lookup(level.contexts, level.totals, context)
            mass = lookup(level.grams, level.kept, query) + lookup(level.contexts, level.freed, context) * probability
            probability = np.where(total > 0, mass / np.maximum(total, 1), probability)
        return probability

    def bits(self, documents: list[bytes]) -> float:
        """Bits that the documents cost, their ends included."""
        return float(-np.log2(self.probabilities(ngrams(documents, self.order))).sum())
