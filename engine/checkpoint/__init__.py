"""Files of weights: their formats, and where they come from."""
