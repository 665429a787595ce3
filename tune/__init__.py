"""Searches over recipes with Ray Tune (not there yet)."""
