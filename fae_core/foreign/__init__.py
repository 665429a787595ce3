"""Networks that others trained, from their checkpoints into this project's modules."""
