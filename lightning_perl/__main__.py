"""``python -m lightning_perl``."""

from lightning_perl.cli import main

if __name__ == "__main__":
    main()
