"""Solution of A1, and wrong answers to it.  The answers to its predictions are in ../key.md."""
