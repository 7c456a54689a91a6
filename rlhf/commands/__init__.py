"""What the command line calls, once its arguments are read: each command that is more than a call of another room.

`grammar` spells the commands and their options. Talks to people by standard output and error; the loop and its roles do the work.
"""
