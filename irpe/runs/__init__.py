"""What every run has, whatever it trains: options, processes, a folder, a loop, a log, checkpoints, a report."""
