"""What a build wrote down, against the files."""
