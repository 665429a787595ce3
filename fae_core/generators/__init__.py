"""Generators of latents: a diffusion transformer and a normalizing flow."""
