"""A8: write the flow adapter."""
