"""How frozen weights are stored."""
