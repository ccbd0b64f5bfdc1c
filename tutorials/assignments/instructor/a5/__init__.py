"""Solution of A5, and wrong answers to it."""
