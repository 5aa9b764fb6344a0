"""Systems under test: started one at a time, put under load, measured, and reported."""
