"""A run leaves these behind for people: metric rows, the console, charts and the verdict on learning."""
