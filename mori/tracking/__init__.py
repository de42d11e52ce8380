"""What a run shows and logs: loggers, progress bar, throughput, the overview before the first step."""
