"""Generated from proto/sippbx/control/v1 by `make proto`; never edited."""
