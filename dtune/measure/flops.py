"""FLOPs of a training step, and the share of a device's peak that a run reaches (MFU)."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.measure.cards import card_of_device

MFU_FORMULA = (
    "(4 N_frozen + 6 N_trained + causal attention 6 L H S (fwd+bwd)) FLOPs a token "
    "x tokens/s / (devices x peak); recomputation is not counted"
)


@dataclass(frozen=True)
class FlopsModel:
    """Counts of one model and method, from which FLOPs a token follow."""

    frozen: int
    """Frozen parameters of matrix products (embedding look-ups multiply nothing)."""
    trained: int
    """Trained parameters of matrix products."""
    num_layers: int
    hidden: int
    """Width of all heads together."""

    def per_token(self, length: float) -> float:
        """FLOPs of forward and backward for one token of a document of ``length`` tokens.

        A product costs 2 FLOPs a parameter in forward, 2 for the input's gradient, and 2 for the
        weight's gradient where it is trained. Causal attention does two products over length / 2
        positions in forward (2 L H S) and twice that in backward.
        """
        return 4.0 * self.frozen + 6.0 * self.trained + 6.0 * self.num_layers * self.hidden * length


def peak_flops(device_name: str) -> float | None:
    """Peak of a device for bf16 and fp16 in FLOP/s; None where it is not known."""
    card = card_of_device(device_name)
    return None if card is None else card.half_flops
