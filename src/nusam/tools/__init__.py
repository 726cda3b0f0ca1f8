"""Memory, sharpness, and the search for ρ."""
