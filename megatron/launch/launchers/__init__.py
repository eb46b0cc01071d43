"""One file per launcher: the nodes of a run, and the command that starts an agent on each."""
