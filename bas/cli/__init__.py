"""The command line: where `bas` starts, the flags, what a file or folder is, and one module for each command."""
