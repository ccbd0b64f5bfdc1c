"""Solution of A2, and wrong answers to it."""
