"""Many runs: where they are kept, and how they are made side by side."""
