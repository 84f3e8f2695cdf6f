"""What is measured of a run besides its training: the noise floor of the ratio, and what changed routes add to it."""
