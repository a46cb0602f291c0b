"""What a reliability campaign asked of an earlier engine, row by row."""
