"""Run a model: token ids in, logits and text out, over weights that stay as they are stored."""
