"""What users import to serve: start, connect, Client and its configuration."""
