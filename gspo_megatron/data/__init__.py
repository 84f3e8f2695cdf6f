"""Questions become token ids here, and token ids packed batches."""
