"""The command ``nusam``, a file for each subcommand."""
