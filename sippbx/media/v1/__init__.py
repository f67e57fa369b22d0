"""Generated from proto/sippbx/media/v1 by `make proto`; never edited."""
