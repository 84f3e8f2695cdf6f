"""From what a config.json means to Megatron's GPTModel chunks of this rank, with their parameters."""
