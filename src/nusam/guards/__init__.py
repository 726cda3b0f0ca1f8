"""What two passes would do to a model, and what is refused."""
