"""What both planes and outside programs import: the contracts' stubs, the process runtime and the `sippbx` command."""
