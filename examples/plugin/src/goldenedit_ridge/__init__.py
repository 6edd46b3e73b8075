"""An editor and a layer selector for goldenedit, each in its own file."""
