"""Dropout whose mask is a function of a seed and a place, so that nothing of it is stored.

Element (adapter j, row t, column k) takes word k % 4 of Philox-4x32-7 with the counter
(k // 4, t, j, 0) and the seed's two halves as the key, and is kept if that word is at least
floor(p * 2^32). Any tile of the mask can be had alone, so all kernels see the same.

Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; seven rounds are the fewest that
pass BigCrush there (table 2).
"""

from __future__ import annotations

import torch

ROUNDS = 7
_WORD = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_RAISE = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """Smallest of the 2^32 words that is kept under dropout ``p``; 0 keeps all."""
    return int(p * 2**32)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by, so that the mean stays: 1 / (1 - p)."""
    return 1.0 / (1.0 - p)


def kept(seed: torch.Tensor, adapter: int, rows: int, columns: int, p: float) -> torch.Tensor:
    """Return the mask [rows, columns] of an adapter, bool: True where dropout keeps.

    Args:
        seed: int64 [1], on the device of the mask.
        adapter: Which of the adapters that share the seed.
        rows: Tokens.
        columns: Features.
        p: Probability that an element is dropped.
    """
    device = seed.device
    zero = torch.zeros((rows, -(-columns // 4)), dtype=torch.int64, device=device)
    counter = (
        zero + torch.arange(zero.shape[1], device=device),
        zero + torch.arange(rows, device=device)[:, None],
        zero + adapter,
        zero,
    )
    words = torch.stack(_philox(counter, seed & _WORD, (seed >> 32) & _WORD), dim=-1)
    return words.flatten(1)[:, :columns] >= threshold(p)


def _philox(
    counter: tuple[torch.Tensor, ...], key0: torch.Tensor, key1: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Four words, each 0 .. 2^32 - 1, of each counter of four such words."""
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, _MULTIPLY[0])
        high2, low2 = _product(c2, _MULTIPLY[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _RAISE[0]) & _WORD, (key1 + _RAISE[1]) & _WORD
    return c0, c1, c2, c3


def _product(word: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a product of two words, without passing 2^63."""
    low = word * (by & 0xFFFF)
    high = (word * (by >> 16) + (low >> 16)) >> 16
    return high, (word * by) & _WORD
