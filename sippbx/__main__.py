"""`python -m sippbx` is `sippbx`."""

from sippbx.cli import main

main()
