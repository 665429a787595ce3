"""Scores of images and features: Fréchet distance, manifolds, Inception, reconstruction."""
