"""What a run leaves behind for people: metric rows, the console, charts and the verdict on learning."""
