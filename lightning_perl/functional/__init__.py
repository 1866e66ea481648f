"""Tensors in, tensors out: torch only, no models, no tokenizers."""
