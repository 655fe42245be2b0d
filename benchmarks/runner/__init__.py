"""Running a suite: what a case is, checks, timing, memory, the machine, the command line."""
