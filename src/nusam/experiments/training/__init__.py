"""One run: data, models, methods and the loop."""
