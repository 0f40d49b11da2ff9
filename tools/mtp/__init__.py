"""Makes a multi-token-prediction head for a model; `tools.train_mtp` is the program."""
