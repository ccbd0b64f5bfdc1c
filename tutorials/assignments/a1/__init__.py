"""Assignment 1: scores and the DMD gradient."""
