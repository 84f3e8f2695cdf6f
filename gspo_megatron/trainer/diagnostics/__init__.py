"""A run is measured here besides its training: the noise floor of the ratio, and what changed routes add to it."""
