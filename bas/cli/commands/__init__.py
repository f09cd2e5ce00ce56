"""The commands of `bas`, one module each: `configure(parser)` declares its flags, `run(args)` does the work.

The module's docstring is the command's help, its EXAMPLES are the help's last lines. Only the chosen command's module
is ever imported.
"""
