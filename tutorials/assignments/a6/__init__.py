"""A6: from f to h."""
