"""Where the teacher's features come from."""
