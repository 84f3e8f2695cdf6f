"""Ranks and process groups: the device, who is who in each parallel dimension, and what ranks tell each other."""
