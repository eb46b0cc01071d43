"""One file per launcher: which nodes a run has, and the command that starts an agent on each."""
