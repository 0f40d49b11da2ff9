"""The event loop: HTTP in, server-sent events out. Knows nothing of tensors."""
