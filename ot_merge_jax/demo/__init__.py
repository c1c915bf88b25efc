"""The demo: what ships with the package, merged and trained."""
