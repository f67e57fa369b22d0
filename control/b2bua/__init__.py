"""The transaction user: between the stack and the calls."""
