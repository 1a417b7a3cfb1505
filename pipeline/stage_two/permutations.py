"""Orders of more numbers than one wants to hold: a number's place in it is computed, by a seed and nothing else.

After Black and Rogaway, Ciphers with arbitrary finite domains (CT-RSA 2002): a Feistel network permutes the numbers
below a power of four, and one that falls beyond the numbers in question goes through it once more until it does not.
"""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
# Of a multiplicative hash of 64 bits: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014).
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Permutation:
    """A permutation of the numbers from 0 to before `size`.

    Args:
        size: How many numbers there are.
        seed: What decides the order, whole numbers of at least 0.
    """

    def __init__(self, size: int, *, seed: Sequence[int]) -> None:
        self._size = size
        self._half_bits = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = np.random.default_rng(list(seed)).integers(0, 1 << 64, _ROUNDS, dtype=np.uint64)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Return what stands at some places of the order, int64."""
        found = self._once(numbers.astype(np.uint64))
        while (beyond := found >= self._size).any():
            found[beyond] = self._once(found[beyond])
        return found.astype(np.int64)

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._half_bits, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * multiplier
    return values ^ (values >> np.uint64(31))
