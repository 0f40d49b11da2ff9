"""The engine thread: decides what each step computes. Knows nothing of HTTP."""
