"""Eight assignments for a course: handouts, starters, checks, solutions, and what graders are tested against."""
