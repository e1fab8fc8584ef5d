"""Loss and exact match on held-out rows."""
