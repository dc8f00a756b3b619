"""Training runs: configuration, loop, folder, evaluation, export."""
