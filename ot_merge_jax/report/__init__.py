"""What a run found: facts for `report.json`, and tables for the terminal."""
