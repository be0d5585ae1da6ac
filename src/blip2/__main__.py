"""`python -m blip2`, as torchrun starts it: the same as the command `blip2`."""

from blip2.cli.main import main

if __name__ == "__main__":
    main()
