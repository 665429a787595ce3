"""Tests, mirroring the folders above, and what they share."""
