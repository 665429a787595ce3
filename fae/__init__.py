"""Feature Auto-Encoders on Ray."""
