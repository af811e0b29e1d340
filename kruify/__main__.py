"""`python -m kruify` is the command line."""

from __future__ import annotations

from kruify.cli.main import main

if __name__ == "__main__":
    main()
