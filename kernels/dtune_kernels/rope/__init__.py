"""Rotary position embedding of queries and keys."""

from dtune_kernels.rope.autograd import rope, rope_
from dtune_kernels.rope.tables import rotary_tables

__all__ = ["rope", "rope_", "rotary_tables"]
