"""Sweeps: their folder, how each trial stands, what starts trials, and which was best."""
