"""Programs that a person runs. Nothing imports them but their tests."""
