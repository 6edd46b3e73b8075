"""The commands of `goldenedit`, each a function that returns its result."""
