"""The command line: where `bas` starts, its flags, and one module for each command.

entry.py finds the command and turns errors into exit codes; commands/ has one module for each.
"""
