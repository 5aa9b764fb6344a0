"""Files as people have them: JSON lines, CSV and Parquet, compressed or not, here or behind a URL."""
