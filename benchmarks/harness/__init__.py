"""Starting systems one at a time, loading them, and writing down what was seen."""
