"""A recipe for every table and figure of the paper, one file each, and what they share."""
