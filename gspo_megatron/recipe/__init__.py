"""YAML and a command line become a recipe that has been checked, before anything imports torch."""
