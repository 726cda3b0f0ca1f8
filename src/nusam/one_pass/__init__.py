"""The next step's ascent rides in this step's descent."""
