"""Generated from proto/sippbx/events/v1 by `make proto`; never edited."""
