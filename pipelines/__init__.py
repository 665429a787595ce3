"""The method on Ray: Data, Train, and the latent store."""
