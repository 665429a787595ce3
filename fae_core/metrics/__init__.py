"""Scores: what a latent keeps, and how good generated images are."""
