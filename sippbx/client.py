"""A typed asyncio client of the control API (sippbx.control.v1)."""
