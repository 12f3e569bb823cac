"""Other projects' files and libraries: Transformers, GGUF."""
