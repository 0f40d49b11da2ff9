"""Makes a draft model by dropping layers of its target; `tools.prune_draft` is the program."""
