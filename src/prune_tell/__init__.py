"""Prune and Tell: image captioning with visual-token pruning."""
