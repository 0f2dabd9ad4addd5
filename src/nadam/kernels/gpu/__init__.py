"""The passes on a GPU, compiled by Triton."""

OLDEST_TRITON = (3, 6)
