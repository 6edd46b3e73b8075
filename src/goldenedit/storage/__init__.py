"""Edit folders: the file format, the card, and writing it so that nothing stops it half-way."""
