"""What is measured: for each kind of case its programs, its samples and its table."""
