"""The Feature Auto-Encoder: torch, timm and numpy; knows no Ray, no MLflow, no object store."""
