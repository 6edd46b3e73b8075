"""Edit folders: the file format, the card, and writing it all at once."""
