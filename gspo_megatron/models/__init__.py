"""What a Hugging Face config.json means, and how each family's tensors are called. Nothing here imports torch."""
