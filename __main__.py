"""`python -m coldstill`, and so `torchrun -m coldstill`, is the `coldstill` command."""

from coldstill.cli import main

if __name__ == "__main__":
    main()
