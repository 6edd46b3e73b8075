"""`python -m goldenedit`: the command line."""

from goldenedit.cli import main

if __name__ == "__main__":
    main()
