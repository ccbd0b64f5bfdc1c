"""Notebooks that walk through each gradient (README.md), and assignments with their grader (assignments/)."""
