"""What a person types: each file parses one subcommand's options, and calls the room that does the work."""
