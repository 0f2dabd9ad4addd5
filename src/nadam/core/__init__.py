"""The rule and what leads up to it; knows no framework."""
