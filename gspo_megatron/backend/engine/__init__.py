"""Training: packed batches through Megatron's schedules and optimizer, with the routing of each pass watched."""
