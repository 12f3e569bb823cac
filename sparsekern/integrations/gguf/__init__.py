"""GGUF files as Transformers models."""
