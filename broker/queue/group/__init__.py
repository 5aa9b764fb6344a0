"""The parts of a backend's consumer group, each as one replica uses it."""
