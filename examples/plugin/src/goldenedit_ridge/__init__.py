"""An editor and a layer selector for goldenedit, each in a file of its own."""
