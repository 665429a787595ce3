"""Searches over recipes with Ray Tune."""
