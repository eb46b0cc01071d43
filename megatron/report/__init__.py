"""Reports of runs: one page with curves, events, configurations and samples, from the files of runs. No torch."""
