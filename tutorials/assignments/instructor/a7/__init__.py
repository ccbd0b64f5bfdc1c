"""Solution of A7, and wrong answers to it.  The answers to its predictions are in ../key.md."""
