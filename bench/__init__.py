"""Programs that measure. A person runs them; nothing imports them."""
