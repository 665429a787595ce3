"""Scores of latents, of reconstructions and of generated images."""
