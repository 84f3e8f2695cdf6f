"""From YAML and a command line to a recipe that has been checked, before anything imports torch."""
