"""How well an edit works."""
