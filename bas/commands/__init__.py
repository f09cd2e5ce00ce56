"""The commands of `bas`, one module each: `configure(parser)` declares its flags, `run(args)` does the work.

The module's first docstring line is the command's help. Only the chosen command's module is ever imported.
"""
