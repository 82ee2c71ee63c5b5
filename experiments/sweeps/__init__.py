"""What a sweep is made of: subjects, programs, results."""
