"""The passes on a GPU, compiled by Triton."""
