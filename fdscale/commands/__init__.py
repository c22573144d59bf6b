"""What the command line can do: one function per command, each by its arguments and the program it calls."""
