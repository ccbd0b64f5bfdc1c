"""A5: backward simulation for k steps."""
