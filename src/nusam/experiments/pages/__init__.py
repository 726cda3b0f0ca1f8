"""What is shown of them: tables, figures, the report."""
