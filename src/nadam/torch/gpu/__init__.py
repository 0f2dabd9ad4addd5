"""Steps whose parameters are all on GPUs."""
