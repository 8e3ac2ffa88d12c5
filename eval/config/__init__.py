"""The command line: flags, YAML files and their checks. Nothing here imports torch."""
