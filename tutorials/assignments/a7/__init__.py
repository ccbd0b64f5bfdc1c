"""Assignment 7: what the graders compare with."""
