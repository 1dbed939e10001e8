"""`python -m funcsam` is the `funcsam` command."""

from funcsam.cli import main

if __name__ == "__main__":
    main()
