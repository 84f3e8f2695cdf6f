"""Advantages come from each rollout batch's own groups, or from a critic."""
