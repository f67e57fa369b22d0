"""What outlives a call: one SQLite file with one writer."""
