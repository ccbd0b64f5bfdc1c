"""Solution of A3, and wrong answers to it.  The answers to its predictions are in ../key.md."""
