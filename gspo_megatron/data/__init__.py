"""From questions to token ids, and from token ids to packed batches."""
