"""A person types these commands: each file parses one subcommand's options, and calls the room that does the work."""
