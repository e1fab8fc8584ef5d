"""FLOPs of a training step, and the share of a device's peak that a run reaches (MFU)."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.measure.cards import card_of_device

FLOPS_FORMULA = (
    "FLOPs a token = 4 N_frozen + 6 N_trained + 6 L H S_document (N: parameters of matrix "
    "products, those of the head for tokens that are trained on alone; a frozen product costs no "
    "weight gradient; causal attention, forward and backward), less 2 N_block + 4 H S_document "
    "for each block below all that is trained; padding and recomputation do not count as work"
)
MFU_FORMULA = f"tokens/s x FLOPs a token / (devices x peak of the data sheet), {FLOPS_FORMULA}"


@dataclass(frozen=True)
class MatrixCounts:
    """Parameters of matrix products; embedding look-ups multiply nothing."""

    frozen: int
    """Of all but the head."""
    trained: int
    head_frozen: int
    head_trained: int
    unreached: int = 0
    """Of the frozen ones those in blocks that backward does not reach."""
    unreached_blocks: int = 0


@dataclass(frozen=True)
class FlopsModel:
    """Counts of one model and method, from which FLOPs a token follow."""

    matrices: MatrixCounts
    num_layers: int
    hidden: int
    """Width of all heads together."""

    def per_token(self, length: float, *, targets: float = 1.0) -> float:
        """FLOPs of forward and backward for one token of a document of ``length`` tokens.

        A product costs 2 FLOPs a parameter in forward, 2 for the input's gradient, and 2 for the
        weight's gradient where it is trained. Causal attention does two products over length / 2
        positions in forward (2 L H S) and twice that in backward. ``targets`` is the share of
        tokens that are trained on, which alone need the head. Blocks that backward does not reach
        do their forward only.
        """
        counts = self.matrices
        layers = 6.0 * self.num_layers - 4.0 * counts.unreached_blocks
        attention = layers * self.hidden * length
        products = 4.0 * counts.frozen + 6.0 * counts.trained - 2.0 * counts.unreached
        return products + attention + targets * self.per_target

    @property
    def per_target(self) -> float:
        """FLOPs of the head for one token that is trained on."""
        return 4.0 * self.matrices.head_frozen + 6.0 * self.matrices.head_trained


def peak_flops(device_name: str) -> float | None:
    """Peak of a device for bf16 and fp16 in FLOP/s; None where it is not known."""
    card = card_of_device(device_name)
    return None if card is None else card.half_flops
