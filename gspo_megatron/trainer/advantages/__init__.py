"""Where advantages come from: each rollout batch's own groups, or a critic."""
