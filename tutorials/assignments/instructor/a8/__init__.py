"""Solution of A8, and wrong answers to it."""
