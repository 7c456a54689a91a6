"""What the command line calls, once its arguments are read: one module for each command, which checks, runs and prints.

`grammar` spells the commands and their options. Talks to people by standard output and error; the loop and its roles do the work. What
takes seconds to import is imported when it is needed, after what can be said without it.
"""
