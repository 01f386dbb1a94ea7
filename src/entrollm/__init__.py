"""Large language models whose weights stay entropy-coded from disk to the matrix product."""
