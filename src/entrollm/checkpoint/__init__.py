"""Hugging Face folders and GGUF files, seen as named tensors that are read one at a time."""
