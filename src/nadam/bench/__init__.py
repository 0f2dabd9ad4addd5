"""What a step takes on this machine, beside the floor and every peer that is installed: `nadam bench`."""
