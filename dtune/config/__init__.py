"""The typed configuration of a run: composed, checked, frozen."""
