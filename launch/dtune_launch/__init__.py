"""Launchers: from a JobSpec to processes. Imports the standard library only."""
