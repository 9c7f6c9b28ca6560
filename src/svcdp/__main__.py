"""``python -m svcdp``: the command line."""

from svcdp.cli import main

if __name__ == "__main__":
    main()
