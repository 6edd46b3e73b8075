"""The commands of `goldenedit`, each a function that reports its result."""
