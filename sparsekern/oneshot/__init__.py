"""prune_model: one-shot pruning of whole models on calibration data."""
