"""The CPU's passes inside XLA's compiled programs."""
