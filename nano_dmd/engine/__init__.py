"""What a run needs.  No concept imports it."""
