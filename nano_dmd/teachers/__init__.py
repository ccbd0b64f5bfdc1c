"""Where denoisers and data come from."""
