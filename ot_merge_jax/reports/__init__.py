"""What a run shows: the schema of its report, pages, tables, plots, the card."""
