"""Solution of A4, and wrong answers to it.  The answers to its predictions are in ../key.md."""
