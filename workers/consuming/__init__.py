"""Claims: which entries a replica takes, when it starts them, and how it settles them."""
