"""What settings would do before they are applied: memory, speed, quality, and who qualifies."""
