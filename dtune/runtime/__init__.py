"""Ranks, seeds, logs, status and capabilities of the machine."""
