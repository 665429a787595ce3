"""What trains on frozen latents: a diffusion transformer and a normalizing flow."""
