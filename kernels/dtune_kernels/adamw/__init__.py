"""AdamW over a flat buffer, in one launch."""

from dtune_kernels.adamw.flat import adamw_flat_

__all__ = ["adamw_flat_"]
