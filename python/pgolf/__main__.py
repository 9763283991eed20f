"""`python -m pgolf` is the command `pgolf`."""

from __future__ import annotations

from pgolf.cli import main

if __name__ == "__main__":
    main()
