"""The vocabulary of events and records, shared by the API, webhooks and whatever else tells of calls."""
